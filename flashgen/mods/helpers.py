"""The jit functions that emitted expressions call where one line does not say what PyTorch means.

A rendered file holds those that it uses, above its kernel. `{jit}` and `{lang}` are the language's decorator and module.
"""

from __future__ import annotations

from collections.abc import Iterable

_TEXTS: dict[str, str] = {
    "floor_div": '''
@{jit}
def floor_div(x, y):
    """x // y rounded down, of a positive y, as in Python; the language's own rounds towards zero."""
    quotient = {lang}.where(x < 0, ~x, x) // y
    return {lang}.where(x < 0, ~quotient, quotient)
''',
    "floor_mod": '''
@{jit}
def floor_mod(x, y):
    """x % y of a positive y, never negative, as in Python; the language's own has the sign of x."""
    remainder = {lang}.where(x < 0, ~x, x) % y
    return {lang}.where(x < 0, y - 1 - remainder, remainder)
''',
    "floor_div_any": '''
@{jit}
def floor_div_any(x, y):
    """x // y rounded down, of a y of any sign."""
    numerator = {lang}.where(y < 0, -x, x)
    quotient = {lang}.where(numerator < 0, ~numerator, numerator) // {lang}.where(y < 0, -y, y)
    return {lang}.where(numerator < 0, ~quotient, quotient)
''',
    "floor_mod_any": '''
@{jit}
def floor_mod_any(x, y):
    """x % y with the sign of y, as in Python."""
    numerator, divisor = {lang}.where(y < 0, -x, x), {lang}.where(y < 0, -y, y)
    remainder = {lang}.where(numerator < 0, ~numerator, numerator) % divisor
    remainder = {lang}.where(numerator < 0, divisor - 1 - remainder, remainder)
    return {lang}.where(y < 0, -remainder, remainder)
''',
    "trunc_div": '''
@{jit}
def trunc_div(x, y):
    """x / y rounded towards zero."""
    quotient = {lang}.where(x < 0, -x, x) // {lang}.where(y < 0, -y, y)
    return {lang}.where((x < 0) != (y < 0), -quotient, quotient)
''',
    "trunc_mod": '''
@{jit}
def trunc_mod(x, y):
    """What x / y rounded towards zero leaves, with the sign of x."""
    remainder = {lang}.where(x < 0, -x, x) % {lang}.where(y < 0, -y, y)
    return {lang}.where(x < 0, -remainder, remainder)
''',
    "nan_maximum": '''
@{jit}
def nan_maximum(x, y):
    """The larger; NaN if either is."""
    return {lang}.where((x > y) | (x != x), x, y)
''',
    "nan_minimum": '''
@{jit}
def nan_minimum(x, y):
    """The smaller; NaN if either is."""
    return {lang}.where((x < y) | (x != x), x, y)
''',
    "number_maximum": '''
@{jit}
def number_maximum(x, y):
    """The larger; where one is NaN the other."""
    return {lang}.where((x > y) | (y != y), x, y)
''',
    "number_minimum": '''
@{jit}
def number_minimum(x, y):
    """The smaller; where one is NaN the other."""
    return {lang}.where((x < y) | (y != y), x, y)
''',
    "sign": '''
@{jit}
def sign(x):
    """-1, 0 or 1; 0 of NaN."""
    return {lang}.where(x > 0, 1, {lang}.where(x < 0, -1, 0)).to(x.dtype)
''',
    "truncate": '''
@{jit}
def truncate(x):
    """x without its fraction."""
    return {lang}.where(x < 0, {lang}.ceil(x), {lang}.floor(x))
''',
    "round_half_even": '''
@{jit}
def round_half_even(x):
    """The nearest integer; of two the even one."""
    below = {lang}.floor(x)
    rest = x - below
    is_odd = {lang}.floor(below * 0.5) * 2.0 != below
    return {lang}.where((rest > 0.5) | ((rest == 0.5) & is_odd), below + 1.0, below)
''',
    "sigmoid": '''
@{jit}
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + {lang}.exp(-x))
''',
    "tanh": '''
@{jit}
def tanh(x):
    """tanh(x): by an odd polynomial near 0, where the exponentials would cancel."""
    square = x * x
    near = x + x * square * (
        -0.33333333 + square * (0.13333333 + square * (-0.05396825 + square * (0.02186949 - square * 0.0088632355)))
    )
    decay = {lang}.exp(-2.0 * {lang}.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return {lang}.where({lang}.abs(x) < 0.25, near, {lang}.where(x < 0, -far, far))
''',
    "exp_minus_one": '''
@{jit}
def exp_minus_one(x):
    """exp(x) - 1 with the digits of a small x: what exp(x) lost by rounding, its logarithm lost as well."""
    size = {lang}.exp(x)
    exact = (size - 1.0) * (x / {lang}.log(size))
    found = {lang}.where(size == 1.0, x, {lang}.where(size - 1.0 == -1.0, -1.0, exact))
    return {lang}.where(size == float("inf"), size, found)
''',
    "log_of_one_plus": '''
@{jit}
def log_of_one_plus(x):
    """log(1 + x) with the digits of a small x: what 1 + x lost by rounding is a factor of the logarithm."""
    size = 1.0 + x
    exact = {lang}.log(size) * (x / (size - 1.0))
    return {lang}.where(size == 1.0, x, {lang}.where(size == float("inf"), size, exact))
''',
    "power": '''
@{jit}
def power(x, y):
    """x to the power y, with the sign of odd powers of a negative x; NaN for its fractional powers."""
    size = {lang}.exp2(y * {lang}.log2({lang}.abs(x)))
    whole = {lang}.floor(y) == y
    is_odd = whole & ({lang}.floor(y * 0.5) * 2.0 != y)
    signed = {lang}.where(x < 0, {lang}.where(is_odd, -size, {lang}.where(whole, size, float("nan"))), size)
    return {lang}.where((y == 0) | (x == 1), 1.0, signed)
''',
    "shift_left": '''
@{jit}
def shift_left(x, y, WIDTH: {lang}.constexpr):
    """x << y; 0 where y is no place of x's WIDTH bits."""
    inside = (y >= 0) & (y < WIDTH)
    return {lang}.where(inside, x << {lang}.where(inside, y, 0), 0).to(y.dtype)
''',
    "shift_right": '''
@{jit}
def shift_right(x, y, WIDTH: {lang}.constexpr):
    """x >> y; the sign alone where y is no place of x's WIDTH bits."""
    return x >> {lang}.where((y >= 0) & (y < WIDTH), y, WIDTH - 1)
''',
}

NAMES = tuple(_TEXTS)


def texts(names: Iterable[str], *, jit: str, lang: str) -> tuple[str, ...]:
    """The functions of these names, in a fixed order, each without blank lines around it."""
    wanted = set(names)
    return tuple(
        text.strip("\n").replace("{jit}", jit).replace("{lang}", lang)
        for name, text in _TEXTS.items()
        if name in wanted
    )
