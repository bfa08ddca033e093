"""Names of the projects whose weights can be imported.

This module imports nothing, so that a command's help can list them at once.
"""

MMAGIC = "open-mmlab/mmagic"
NAOTO0804 = "naoto0804/pytorch-inpainting-with-partial-conv"
CLIMATE_RECONSTRUCTION_AI = "FREVA-CLINT/climatereconstructionAI"
PCONV_KERAS = "MathiasGruber/PConv-Keras"

PROJECT_NAMES = (MMAGIC, NAOTO0804, CLIMATE_RECONSTRUCTION_AI, PCONV_KERAS)

# Their networks fill fields of measurements instead of images.
FIELD_PROJECTS = (CLIMATE_RECONSTRUCTION_AI,)
