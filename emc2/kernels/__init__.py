"""Hot loops by hand: each kernel with its plain JAX reference."""
