"""Methods and bounds that several tests run, each compiled once."""

import functools

import jax
import jax.numpy as jnp

from emc2.topics import mixture
from emc2.topics.mixture import model as model_lib

from tests.topics.mixture import oracle


@functools.cache
def make_model(num_components=5, dim=2):
  """A mixture of diagonal Gaussians with the oracle's priors."""
  family = mixture.gaussian_diagonal(
    dim,
    degrees=oracle.DEGREES,
    scale=oracle.SCALE,
    mean=oracle.MEAN,
    mean_strength=oracle.BETA,
  )
  return mixture.make(family, num_components, concentration=oracle.ALPHA)


@functools.cache
def method(name, num_components=5, **settings):
  """One of `vi`, `svi` and `esvi`, both functions jitted."""
  make = getattr(getattr(mixture, name), name)
  made = make(make_model(num_components), **settings)
  return jax.tree.map(jax.jit, made)


@functools.cache
def elbo(num_components=5):
  """Of statistics and data, jitted."""
  return jax.jit(functools.partial(mixture.elbo, make_model(num_components)))


@functools.cache
def esvi_elbo(num_components):
  """Of a state of ESVI, jitted."""
  model = make_model(num_components)
  return jax.jit(functools.partial(mixture.esvi.elbo, model))


@functools.cache
def responsibilities(num_components=5):
  """Of statistics and data, jitted."""
  model = make_model(num_components)
  return jax.jit(functools.partial(model_lib.responsibilities, model))


@functools.cache
def summarize(num_components=5):
  """Of data and responsibilities, jitted."""
  model = make_model(num_components)
  return jax.jit(functools.partial(model_lib.summarize, model))


def types(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def problem(num_rows=64, num_components=5, dtype='float64'):
  """Rows and a start, the same ones in NumPy."""
  x = oracle.points(0, num_rows, 2)[0]
  z = oracle.starts(1, num_rows, num_components)
  return x, z, jnp.asarray(x, dtype)
