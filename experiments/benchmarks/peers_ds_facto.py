"""What factorisation machines are trained with today: libFM's descent, myFM.

Served by `worker.py`; needs NumPy. libFM 1.4.4 is not on PyPI: its stochastic
descent stands here, its loops and its doubles in its order, for a C++ compiler,
`g++` or what `CXX` names; without one its rows say so. It is a little faster
than the program itself, which also reads its rows through an iterator and
predicts the test ratings in every pass. Ratings come as a file of `numpy.savez`
with `ids` (n, 2), a user and an item, `labels` (n,) and `num_features`.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import time

import numpy as np

PACKAGES = ('numpy', 'scipy', 'myfm')

SOURCE = r"""
#include <algorithm>
#include <cstdint>
extern "C" void fm_pass(int64_t n, int64_t d, int64_t k, const int64_t* starts,
                        const int32_t* ids, const float* values,
                        const double* labels, double low, double high,
                        double rate, double ridge_w, double ridge_v,
                        double* w0, double* w, double* v, double* sum) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t a = starts[i], b = starts[i + 1];
    double p = *w0;
    for (int64_t e = a; e < b; ++e) p += w[ids[e]] * values[e];
    for (int64_t f = 0; f < k; ++f) {
      double s = 0, q = 0;
      for (int64_t e = a; e < b; ++e) {
        const double z = v[f * d + ids[e]] * values[e];
        s += z;
        q += z * z;
      }
      sum[f] = s;
      p += 0.5 * (s * s - q);
    }
    const double g = std::max(low, std::min(high, p)) - labels[i];
    *w0 -= rate * g;
    for (int64_t e = a; e < b; ++e) {
      double& t = w[ids[e]];
      t -= rate * (g * values[e] + ridge_w * t);
    }
    for (int64_t f = 0; f < k; ++f)
      for (int64_t e = a; e < b; ++e) {
        double& t = v[f * d + ids[e]];
        const double x = values[e];
        t -= rate * (g * (sum[f] * x - t * x * x) + ridge_v * t);
      }
  }
}
"""


def read(path):
  """Ids, labels and the number of features."""
  with np.load(path) as found:
    return found['ids'], found['labels'], int(found['num_features'])


def error(ids, labels, bias, linear, factors):
  """Root mean squared error of ratings, clipped to the range of the labels."""
  users, items = ids.T
  scores = bias + linear[users] + linear[items]
  scores = scores + np.sum(factors[users] * factors[items], axis=1)
  scores = np.clip(scores, labels.min(), labels.max())
  return float(np.sqrt(np.mean((scores - labels) ** 2)))


@functools.cache
def compile_pass():
  """The C++ function.

  Raises:
    ImportError: If there is no compiler.
  """
  compiler = shutil.which(os.environ.get('CXX') or 'g++')
  if compiler is None:
    raise ImportError('no C++ compiler: set CXX')
  with tempfile.TemporaryDirectory(prefix='emc2-bench-') as folder:
    source = os.path.join(folder, 'fm.cpp')
    with open(source, 'w') as file:
      file.write(SOURCE)
    library = os.path.join(folder, 'fm.so')
    command = [compiler, '-O3', '-shared', '-fPIC', source, '-o', library]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(library).fm_pass


def make_pass(train, rank, rate, ridge, seed):
  """A function that makes one pass, and the parameters that it moves."""
  run = compile_pass()
  ids, labels, num_features = read(train)
  rng = np.random.default_rng(seed)
  bias, linear = np.zeros(1), np.zeros(num_features)
  factors = rng.normal(scale=0.1, size=(rank, num_features))
  arrays = (
    np.arange(len(ids) + 1) * 2,
    np.ascontiguousarray(ids, np.int32),
    np.ones(ids.shape, np.float32),
    np.asarray(labels, np.float64),
  )
  sums = np.zeros(rank)
  pointer = lambda x: x.ctypes.data_as(ctypes.c_void_p)
  numbers = labels.min(), labels.max(), rate, ridge, ridge

  def go():
    run(
      *map(ctypes.c_int64, (len(ids), num_features, rank)),
      *map(pointer, arrays),
      *map(ctypes.c_double, numbers),
      *map(pointer, (bias, linear, factors, sums)),
    )

  # What the pointers point to must live as long as the function.
  go.arrays = arrays, sums
  return go, (bias, linear, factors)


def time_pass(*, train, rank):
  """One pass of libFM's descent."""
  return make_pass(train, rank, rate=0.01, ridge=0.05, seed=0)[0]


def fit_libfm(*, train, test, rank, passes, seed):
  """Seconds after each pass, and the error on the test ratings."""
  go, params = make_pass(train, rank, rate=0.01, ridge=0.05, seed=seed)
  ids, labels, _ = read(test)
  seconds, errors, spent = [], [], 0.0
  for _ in range(passes):
    start = time.perf_counter()
    go()
    spent += time.perf_counter() - start
    seconds.append(spent)
    errors.append(error(ids, labels, params[0], params[1], params[2].T))
  return {'seconds': seconds, 'rmse': errors}


def fit_myfm(*, train, test, rank, passes, seed):
  """Gibbs sampling by myFM: an average of many machines, not one."""
  import myfm
  import scipy.sparse

  def matrix(path):
    ids, labels, num_features = read(path)
    rows = np.repeat(np.arange(len(ids)), 2)
    entries = np.ones(ids.size), (rows, ids.ravel())
    shape = len(ids), num_features
    return scipy.sparse.csr_matrix(entries, shape=shape), labels

  model = myfm.MyFMRegressor(rank=rank, random_seed=seed)
  start = time.perf_counter()
  model.fit(*matrix(train), n_iter=passes, n_kept_samples=passes)
  seconds = time.perf_counter() - start
  features, labels = matrix(test)
  scores = np.clip(model.predict(features), labels.min(), labels.max())
  rmse = float(np.sqrt(np.mean((scores - labels) ** 2)))
  return {'seconds': [seconds], 'rmse': [rmse]}


CASES = {'pass': time_pass}
VALUES = {'libFM': fit_libfm, 'myFM': fit_myfm}
