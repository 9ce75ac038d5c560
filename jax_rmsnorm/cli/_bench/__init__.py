"""The parts of ``jax-rmsnorm bench``: what is measured, who takes part, how it is timed and shown."""
