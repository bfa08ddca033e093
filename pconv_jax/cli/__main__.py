"""For ``python -m pconv_jax.cli``."""

from pconv_jax import cli

if __name__ == "__main__":  # Not where workers of a pipeline import it.
    cli.main()
