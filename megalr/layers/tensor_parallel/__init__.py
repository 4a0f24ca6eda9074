"""Replaced layers that tensor-parallel ranks share; dense ones are the engine's to cut.

Each parametrization says how its layers are cut (``Parametrization.cut``). A column-parallel low-rank layer has rows of
B and a copy of A, a row-parallel one columns of A and a copy of B: what crosses the network is r wide, once a layer,
forward or backward. Layers with a weight of full rank send what dense ones do, the gradient of x or y, and the
gradient of the factor that all ranks have.
"""
