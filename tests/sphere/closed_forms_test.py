"""The formulas against printed numbers, quadrature and loops over pairs."""

import math

import numpy as np
from absl.testing import parameterized
from scipy import integrate, special

from emc2.sphere import closed_forms


class FamiliesTest(parameterized.TestCase):
  @parameterized.parameters(
    (5, 1.0, 6.881909602356),
    (5, 2.0, 5.0),
    (100, 1.0, 7529.285237805),
    (100, 2.0, 41662.5),
  )
  def test_polygon(self, n, s, want):
    np.testing.assert_allclose(closed_forms.polygon(n, s), want, rtol=1e-12)

  @parameterized.parameters(2, 3, 17, 64)
  def test_polygon_at_special_exponents(self, n):
    got = closed_forms.polygon(n, 2.0)
    np.testing.assert_allclose(got, n * (n * n - 1) / 24, rtol=1e-13)
    sines = [1 / math.sin(math.pi * j / n) for j in range(1, n)]
    got = closed_forms.polygon(n, 1.0)
    np.testing.assert_allclose(got, n / 4 * sum(sines), rtol=1e-13)
    got = closed_forms.polygon(n, 0.0)
    np.testing.assert_allclose(got, -n / 2 * math.log(n), rtol=1e-12)

  def test_simplex(self):
    got = closed_forms.simplex(4, 1.0)
    np.testing.assert_allclose(got, 3.674234614175, rtol=1e-12)
    for n in (2, 3, 9):
      side = math.sqrt(2 * n / (n - 1))
      pairs = n * (n - 1) / 2
      for s in (0.5, 1.0, 2.0, 7.0):
        got = closed_forms.simplex(n, s)
        np.testing.assert_allclose(got, pairs * side**-s, rtol=1e-13)
      got = closed_forms.simplex(n, 0.0)
      np.testing.assert_allclose(got, -pairs * math.log(side), rtol=1e-13)

  def test_cross_polytope(self):
    got = closed_forms.cross_polytope(3, 1.0)
    np.testing.assert_allclose(got, 9.985281374239, rtol=1e-12)
    for k in (2, 3, 9):
      right = 2 * k * (k - 1)
      for s in (0.5, 1.0, 2.0, 7.0):
        got = closed_forms.cross_polytope(k, s)
        want = right * 2 ** (-s / 2) + k * 2.0**-s
        np.testing.assert_allclose(got, want, rtol=1e-13)
      got = closed_forms.cross_polytope(k, 0.0)
      want = -(right / 2 + k) * math.log(2)
      np.testing.assert_allclose(got, want, rtol=1e-13)

  def test_families_meet(self):
    for s in (0.0, 0.3, 1.0, 5.0):
      square = closed_forms.polygon(4, s)
      np.testing.assert_allclose(
        closed_forms.cross_polytope(2, s), square, rtol=1e-13
      )
      triangle = closed_forms.polygon(3, s)
      np.testing.assert_allclose(
        closed_forms.simplex(3, s), triangle, rtol=1e-13
      )


class CodesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('bipyramid', 6.474691494688, 4.25),
    ('icosahedron', 49.1652530576, 39.0),
    ('600-cell', 5796.5764557024, 5395.0),
    ('clebsch_16', 85.6062329784, 62.5),
    ('schlafli_27', 254.3055478210, 189.0),
    ('gosset_56', 1131.6687666471, 857.5),
    ('e8_240', 21351.2483404949, 16550.0),
    ('isotropic_112', 4430.7856919689, 3181.5),
    ('mclaughlin_162', 9324.4940320010, 6725.25),
    ('higman_sims_100', 3521.3194954333, 2520.8333333333),
    ('mclaughlin_275', 26993.9560006726, 19525.0),
    ('isotropic_891', 285086.5410927166, 207405.0),
    ('equiangular_552', 109135.4579312188, 79131.5),
    ('leech_4600', 7610619.8928358732, 5544437.5),
    ('leech_196560', 13894310256.5095653534, 10118206098.0),
  )
  def test_printed(self, name, coulomb, inverse_square):
    got = [closed_forms.code(name, s) for s in (1.0, 2.0)]
    np.testing.assert_allclose(got, [coulomb, inverse_square], rtol=3e-12)

  @parameterized.parameters(0.0, 0.5, 1.0, 3.0, 20.0)
  def test_bipyramid(self, s):
    f = (lambda r: -math.log(r)) if s == 0 else (lambda r: r**-s)
    want = f(2.0) + 6 * f(math.sqrt(2)) + 3 * f(math.sqrt(3))
    got = closed_forms.code('bipyramid', s)
    np.testing.assert_allclose(got, want, rtol=1e-13)

  @parameterized.parameters(*closed_forms.CODES)
  def test_is_a_spherical_design(self, name):
    """Balanced, and a tight frame: so are all of these but for one."""
    code = closed_forms.CODES[name]
    first = 1 + sum(m * t for t, m in code.products.items())
    second = 1 + sum(m * t * t for t, m in code.products.items())
    self.assertAlmostEqual(first, 0, delta=1e-9 * code.num_points)
    frame = code.num_points / code.dim
    # The bipyramid is no frame: it is no design of strength two.
    delta = 0.1 if name == 'bipyramid' else 1e-9 * code.num_points
    self.assertAlmostEqual(second, frame, delta=delta)

  def test_logarithm_is_the_slope_at_zero(self):
    products = {-1.0: 1, 0.0: 4}
    step = 1e-5
    ahead, behind = (
      closed_forms.energy_from_products(6, products, s)
      for s in (2 * step, step)
    )
    # E_s = 15 + s E_0 + O(s^2)
    slope = (4 * (behind - 15) - (ahead - 15)) / (2 * step)
    got = closed_forms.energy_from_products(6, products, 0.0)
    np.testing.assert_allclose(got, slope, rtol=1e-8)


class UniformMeanTest(parameterized.TestCase):
  def test_coulomb_in_space(self):
    for n in (2, 10, 100):
      got = closed_forms.uniform_mean(n, 3, 1.0)
      np.testing.assert_allclose(got, n * (n - 1) / 2, rtol=1e-13)

  @parameterized.product(k=[2, 3, 4, 5, 8, 9], s=[0.0, 0.3, 0.9, 2.5])
  def test_is_the_integral(self, k, s):
    if s >= k - 1:
      with self.assertRaisesRegex(ValueError, 'exponent must be less than'):
        closed_forms.uniform_mean(7, k, s)
      return
    power = lambda r: -math.log(r) if s == 0 else r**-s
    weight = lambda angle: math.sin(angle) ** (k - 2)
    over = lambda angle: weight(angle) * power(2 * math.sin(angle / 2))
    top, _ = integrate.quad(over, 0, math.pi, epsabs=1e-12, limit=200)
    bottom, _ = integrate.quad(weight, 0, math.pi, epsabs=1e-12)
    got = closed_forms.uniform_mean(7, k, s)
    # On the circle the mean logarithm is 0.
    np.testing.assert_allclose(got, 21 * top / bottom, rtol=1e-8, atol=1e-7)

  @parameterized.parameters((3, 2.0), (3, 2.5), (2, 1.0))
  def test_diverges(self, k, s):
    with self.assertRaisesRegex(ValueError, 'the mean diverges'):
      closed_forms.uniform_mean(10, k, s)


class AsymptoticTest(parameterized.TestCase):
  def test_coulomb_constant(self):
    for n in (1, 4):
      n *= 100
      got = (closed_forms.asymptotic(n, 1.0) - n * n / 2) / n**1.5
      np.testing.assert_allclose(got, -0.553051293357595, rtol=1e-13)

  def test_inverse_square_constant(self):
    n = 100
    got = closed_forms.asymptotic(n, 2.0) / n**2 - math.log(n) / 8
    np.testing.assert_allclose(2 * got, -0.0857684103, atol=5e-11)
    np.testing.assert_allclose(got, -0.042884205, atol=5e-10)

  def test_logarithmic_constant(self):
    n = 100
    rest = 2 * closed_forms.asymptotic(n, 0.0)
    rest -= (0.5 - math.log(2)) * n**2 - n * math.log(n) / 2
    np.testing.assert_allclose(rest / n, -0.0556053, atol=5e-8)

  @parameterized.parameters(2.5, 3.0, 3.9)
  def test_is_the_zeta_function_where_that_converges(self, s):
    third = special.zeta(s / 2, 1 / 3) - special.zeta(s / 2, 2 / 3)
    lattice = 6 * 3 ** (-s / 2) * special.zeta(s / 2) * third
    # The lattice whose cells have the area 4 pi / n.
    lattice *= (math.sqrt(3) / 2 / (4 * math.pi)) ** (s / 2) / 2
    for n in (10, 1000):
      want = lattice * n ** (1 + s / 2) + 2.0**-s / (2 - s) * n**2
      got = closed_forms.asymptotic(n, s)
      np.testing.assert_allclose(got, want, rtol=1e-12)

  def test_is_continuous_across_the_pole(self):
    """At s = 2 both terms have poles, which cancel."""
    below, at, above = (
      closed_forms.asymptotic(50, s) for s in (2 - 1e-4, 2.0, 2 + 1e-4)
    )
    np.testing.assert_allclose((below + above) / 2, at, rtol=1e-6)

  def test_logarithm_is_the_slope_at_zero(self):
    """But for the terms in n, E_s = n^2 / 2 - n / 2 + s E_0 + O(s^2)."""
    n, step = 200, 1e-4
    rise = [
      (closed_forms.asymptotic(n, s) - n * (n - 1) / 2) / s
      for s in (2 * step, step)
    ]
    got = closed_forms.asymptotic(n, 0.0)
    np.testing.assert_allclose(2 * rise[1] - rise[0], got, rtol=1e-6)

  def test_fit(self):
    want = 400**2 / 2 - 0.5523865 * 400**1.5 + 0.0809 * 20
    np.testing.assert_allclose(closed_forms.coulomb_fit(400), want, rtol=1e-14)


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters(
    lambda: closed_forms.polygon(1, 1.0),
    lambda: closed_forms.simplex(1, 1.0),
    lambda: closed_forms.uniform_mean(1, 3, 1.0),
    lambda: closed_forms.asymptotic(1, 1.0),
    lambda: closed_forms.coulomb_fit(1),
    lambda: closed_forms.energy_from_products(1, {}, 1.0),
  )
  def test_few_points(self, call):
    with self.assertRaisesRegex(ValueError, 'num_points .* 2, got 1'):
      call()

  @parameterized.parameters(
    lambda: closed_forms.cross_polytope(1, 1.0),
    lambda: closed_forms.uniform_mean(5, 1, 0.0),
  )
  def test_low_dimension(self, call):
    with self.assertRaisesRegex(ValueError, 'dim .* 2, got 1'):
      call()

  @parameterized.product(
    call=[
      lambda s: closed_forms.polygon(5, s),
      lambda s: closed_forms.simplex(5, s),
      lambda s: closed_forms.cross_polytope(5, s),
      lambda s: closed_forms.code('e8_240', s),
      lambda s: closed_forms.uniform_mean(5, 3, s),
      lambda s: closed_forms.asymptotic(5, s),
    ],
    s=[-1.0, math.nan, math.inf],
  )
  def test_exponent(self, call, s):
    with self.assertRaisesRegex(ValueError, f'exponent must be .*got {s}'):
      call(s)

  def test_asymptotic_ends_at_four(self):
    with self.assertRaisesRegex(ValueError, 'less than 4, got 4.0'):
      closed_forms.asymptotic(10, 4.0)

  def test_unknown_code(self):
    with self.assertRaisesRegex(ValueError, "bipyramid.*got 'prism'"):
      closed_forms.code('prism', 1.0)

  def test_products(self):
    with self.assertRaisesRegex(ValueError, r'lie in \[-1, 1\)'):
      closed_forms.energy_from_products(6, {1.0: 1, 0.0: 4}, 1.0)
    with self.assertRaisesRegex(ValueError, r'= 5, got 4'):
      closed_forms.energy_from_products(6, {-1.0: 1, 0.0: 3}, 1.0)
