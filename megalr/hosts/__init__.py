"""The engines that step the optimizer. What megalr has to know of their internals is known here alone."""
