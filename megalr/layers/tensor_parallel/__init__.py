"""Factorized layers that tensor-parallel ranks share; dense ones are the engine's to cut.

A column-parallel layer has rows of B and a copy of A, a row-parallel one columns of A and a copy of B: what crosses
the network is r wide, once a layer, forward or backward.
"""
