"""The scope ``mmdet_lors``, which mmengine gives to all that is inherited by ``_base_ = "mmdet_lors::..."``.

Its registries are empty: they pass every name on to mmdet's, where all of our parts are registered.
"""

from mmdet import registry as mmdet_registry
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import Registry

SCOPE = "mmdet_lors"

REGISTRIES = {
    name: Registry(parent.name, parent=parent, scope=SCOPE, locations=[SCOPE])
    for name, parent in vars(mmdet_registry).items()
    if isinstance(parent, Registry)
}
"""Registries under their names in mmdet, ``MODELS`` and so on."""

# mmengine accepts configs only of the packages in this table. It looks for a distribution of the name given there and,
# if it finds none, as is intended here, for a module: that finds an editable install as well.
MODULE2PACKAGE[SCOPE] = __name__
