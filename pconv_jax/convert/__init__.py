"""Weights of other projects: files to arrays, and arrays to parameter trees."""

from pconv_jax.convert.arrays import read_arrays as read_arrays
from pconv_jax.convert.arrays import to_tree as to_tree
