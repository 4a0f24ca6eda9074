"""Sharding of whole-matrix work: layouts (what lies where), placement (who owns what), exchange (moving data).

Nothing here knows a rule or an engine.
"""
