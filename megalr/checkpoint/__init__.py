"""Checkpoints that move between layouts: what one ZeRO stage, world size and TP size has written any other loads.

``saving`` and ``loading`` have :func:`megalr.save_checkpoint` and :func:`megalr.load_checkpoint`; the rest needs no
engine and no torch.distributed. ``python -m megalr.checkpoint`` inspects and verifies them, and exports models.
"""
