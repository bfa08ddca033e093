"""Images and masks from files, as batches of NumPy arrays.

`sources` opens collections of encoded images: a folder, tar files, a TFDS data set, or
the few photos that scikit-image carries. `mask_folder` reads mask images. `pipeline`
turns them into uint8 batches: images ``[B, S, S, 3]`` in RGB, and masks
``[B, S, S, 1]``, 1 = valid, 0 = hole.

The training pipeline is a pure function of the global record index. The image of record
n, and every random number drawn for it, depend on n and the seed only, not on the
number of threads, worker processes or hosts. To resume, only the step is needed.
"""
