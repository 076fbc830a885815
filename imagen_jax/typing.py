"""Array types, named as in the paper.

In the shapes: b images, h × w pixels, c channels, l text positions, d width of
the text embeddings.
"""

import jax
import numpy as np
from jaxtyping import Bool, Float, Key, UInt8, UInt32

Array = jax.Array | np.ndarray

# Arrays of any shape.
Values = Float[Array, '...']
# Arrays or Python numbers; per sample, [b] or a scalar.
Scalars = Values | np.floating | float
# z, x, eps and v of any shape.
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
