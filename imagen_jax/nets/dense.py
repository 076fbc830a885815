"""Dense layers and convolutions whose parameters may be sharded.

Each gathers its own parameters just before it uses them, in its computation
dtype. Otherwise XLA's partitioner propagates the sharding of a kernel to the
activations and then gathers those: for the 64→256 model on 256 chips, a whole
batch of 2,048 images on every chip.

The gradient of a kernel is summed over the devices in the kernel's own type,
float32. The partitioner would sum it where it arises, in the type of the
activations: in bfloat16, whose eight bits lose most of a sum of 256 terms.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name

from imagen_jax import collectives, sharding
from imagen_jax.typing import Array

Product: TypeAlias = Callable[[Any, Any], Any]  # of an input and a kernel
SAVED = 'saved'  # by `nets.remat`'s policy `convs_saveable`: has this name


def multiply(product: Product, x: Array, param: Array) -> Any:
  """`product(x, param)` in x's type; the gradient is summed in `param`'s.

  Args:
    product: linear in both.
    x: [B, ...], the batch split over the devices.
    param: the kernel, which is gathered here.
  """
  kernel = collectives.gather(param, x.dtype)
  wide = kernel.dtype == jnp.float32 and not collectives.has_zero()
  if param.dtype != jnp.float32 or wide:
    return checkpoint_name(product(x, kernel), SAVED)
  kernel = jax.lax.stop_gradient(kernel)
  summed = collectives.has_zero() and len(x) % collectives.platform()[1] == 0
  y = _multiply(product, x, kernel, collectives.gather(param, summed=summed))
  return checkpoint_name(y, SAVED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(product: Product, x: Array, kernel: Array, param: Array) -> Any:
  """`product(x, kernel)`, whose gradient goes to `param`, the uncast kernel."""
  return product(x, kernel)


def _forward(
  product: Product, x: Array, kernel: Array, param: Array
) -> tuple[Any, tuple[Array, Array]]:
  return product(x, kernel), (x, kernel)


def _backward(
  product: Product, saved: tuple[Array, Array], gradient: Array
) -> tuple[Any, None, Any]:
  """Transposes each device's product on its rows, then sums over devices."""
  x, kernel = saved
  spec = collectives.gradient_spec(kernel)

  def of_kernel(x: Array, gradient: Array) -> Any:
    transpose = jax.linear_transpose(functools.partial(product, x), kernel)
    return transpose(gradient)[0].astype(jnp.float32)

  def summed(x: Array, gradient: Array) -> Any:
    return collectives.sum_gradient(of_kernel(x, gradient), spec)

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or len(x) % mesh.size:
    total = of_kernel(x, gradient)
  else:
    total = jax.shard_map(
      summed,
      in_specs=(sharding.BATCH, sharding.BATCH),
      out_specs=spec,
      # Else the transpose itself sums, in bfloat16.
      check_vma=False,
    )(x, gradient)
  of_x = jax.linear_transpose(lambda x: product(x, kernel), x)
  return of_x(gradient)[0], None, total


_multiply.defvjp(_forward, _backward)


def _promote(
  inputs: Array, kernel: Array, bias: Array | None, *, dtype: Any = None
) -> tuple[Any, Any, Any]:
  """Flax's `promote_dtype` of the input; parameters keep their type."""
  inputs = promote_dtype(inputs, dtype=dtype)[0]
  return inputs, kernel, None if bias is None else collectives.gather(bias)


def _dot(x: Array, kernel: Array, dimensions: Any, **options: Any) -> Any:
  product = functools.partial(
    jax.lax.dot_general, dimension_numbers=dimensions, **options
  )
  return multiply(product, x, kernel)


def _convolve(
  x: Array, kernel: Array, strides: Any, padding: Any, **options: Any
) -> Any:
  product = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=strides,
    padding=padding,
    **options,
  )
  return multiply(product, x, kernel)


@jax.custom_vjp
def _adapted(x: Array, kernel: Array, bias: Array, a: Array, b: Array) -> Any:
  """x W + (x A) B + bias, summed in float32 and rounded to x's type once.

  Added to a rounded x W, a small change would be rounded away.
  """
  wide = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
  low = jnp.dot(x, a.astype(x.dtype))
  y = wide(x, kernel) + wide(low, b.astype(x.dtype)) + bias
  return y.astype(x.dtype)


def _adapted_backward(saved: Any, gradient: Array) -> Any:
  """The gradient of products in x's type; A's and B's are as a kernel's."""

  def plain(x: Array, kernel: Array, bias: Array, a: Array, b: Array) -> Any:
    change = multiply(jnp.dot, multiply(jnp.dot, x, a), b)
    return jnp.dot(x, kernel) + change + bias.astype(x.dtype)

  return jax.vjp(plain, *saved)[1](gradient)


_adapted.defvjp(lambda *args: (_adapted(*args), args), _adapted_backward)


# The bias is added in its own type, in which its gradient is summed.


class Dense(nn.Dense):
  """Flax's layer; with a low-rank adapter if its parameters hold `a` and `b`.

  Then the output is x W + (x A) B + bias (Hu et al. 2021).
  """

  promote_dtype: Any = _promote
  dot_general: Any = _dot

  def __call__(self, inputs: Array) -> Any:
    if not self.has_variable('params', 'a'):
      return jnp.asarray(super().__call__(inputs), self.dtype)
    x, params = jnp.asarray(inputs, self.dtype), self.variables['params']
    kernel = collectives.gather(params['kernel'], x.dtype)
    return _adapted(x, kernel, params['bias'], params['a'], params['b'])


class DenseGeneral(nn.DenseGeneral):
  promote_dtype: Any = _promote
  dot_general: Any = _dot

  def __call__(self, inputs: Array) -> Any:
    return jnp.asarray(super().__call__(inputs), self.dtype)


class Conv(nn.Conv):
  promote_dtype: Any = _promote
  conv_general_dilated: Any = _convolve

  def __call__(self, inputs: Array) -> Any:
    return jnp.asarray(super().__call__(inputs), self.dtype)
