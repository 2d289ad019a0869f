"""The scope ``mmdet_lors``, which mmengine gives to whatever comes from ``_base_ = "mmdet_lors::..."``.

Its registries hold nothing: they hand every name on to mmdet's, where all of our parts are registered.
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
"""As they are called in mmdet, ``MODELS`` and so on."""

# mmengine takes configs of the packages in this table alone. It looks for a distribution of the name there and,
# where it finds none, which is meant here, for a module: that finds an editable install, too.
MODULE2PACKAGE[SCOPE] = __name__
