"""Newton methods for convex objectives, whose models are bounded by a cubic."""
