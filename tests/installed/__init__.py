"""The package as others get it: what is in an sdist and a wheel, and that it works far from the checkout."""
