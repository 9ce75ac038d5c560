"""What ``jax-rmsnorm train`` is made of.

Each line depends on those above it:

    config     history    interrupt
    corpus     layout     results     progress
    model
    step       backend
    checkpoint generate   loop
    plan
    session
"""
