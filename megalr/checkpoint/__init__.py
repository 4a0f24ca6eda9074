"""Checkpoints that move between layouts: what one ZeRO stage, world size and TP size has written any other loads.

``saving`` and ``loading`` have :func:`megalr.save_checkpoint` and :func:`megalr.load_checkpoint`; ``manifest`` and
``reading`` need neither an engine nor torch.distributed.
"""
