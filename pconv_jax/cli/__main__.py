"""For ``python -m pconv_jax.cli``."""

from pconv_jax import cli

if __name__ == "__main__":  # Worker processes import this module, too.
    cli.main()
