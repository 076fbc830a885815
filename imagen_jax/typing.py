"""Array types, named as in the paper; their shapes are in these terms.

b images, h × w pixels, c channels, l text positions, d their width.
"""

import jax
import numpy as np
from jaxtyping import Bool, Float, Key, UInt8, UInt32

Array = jax.Array | np.ndarray

# Numbers of any shape, Python's own included; of samples: [b] or a scalar.
Scalars = Float[Array, '...'] | np.floating | float
# z, x, eps and v, whatever they are images of.
Sample = Float[Array, 'b *shape']
LogSNR = Float[Array, ' b']

Image = Float[Array, 'b h w c']
LowRes = Float[Array, 'b h_low w_low c']
PixelMask = Float[Array, 'b h w 1']
Uint8Image = UInt8[Array, 'b h w c']

TextEmb = Float[Array, 'b l d']
TextMask = Bool[Array, 'b l']
AugLevel = Float[Array, ' b']

Keys = Key[jax.Array, ' b']
KeyData = UInt32[Array, 'b 2']
