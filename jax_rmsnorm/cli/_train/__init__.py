"""What ``jax-rmsnorm train`` is made of.

Each line depends on those above it:

    config     history    interrupt
    corpus     model      results     progress
    layout
    step       backend
    checkpoint generate   loop
    plan
    session
"""
