"""The runtime type checker; an int is accepted as a float, as in PEP 484."""

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
