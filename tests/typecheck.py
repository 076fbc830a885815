"""The checker of types and shapes; an int is a float, as PEP 484 has it."""

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
