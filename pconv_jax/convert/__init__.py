"""Weights of other projects: files to arrays, and arrays to parameter trees."""

from pconv_jax.convert.arrays import checksum as checksum
from pconv_jax.convert.arrays import from_torch as from_torch
from pconv_jax.convert.arrays import read_arrays as read_arrays
from pconv_jax.convert.arrays import to_tree as to_tree
from pconv_jax.convert.arrays import write_arrays as write_arrays
from pconv_jax.convert.importers import PROJECTS as PROJECTS
from pconv_jax.convert.importers import Imported as Imported
from pconv_jax.convert.importers import Project as Project
from pconv_jax.convert.importers import import_layers as import_layers
from pconv_jax.convert.importers import import_network as import_network
from pconv_jax.convert.published import Published as Published
from pconv_jax.convert.published import find_published as find_published
from pconv_jax.convert.vgg_file import VGG16_URL as VGG16_URL
from pconv_jax.convert.vgg_file import download_vgg16 as download_vgg16
from pconv_jax.convert.vgg_file import read_vgg as read_vgg
from pconv_jax.convert.vgg_file import write_cache as write_cache
