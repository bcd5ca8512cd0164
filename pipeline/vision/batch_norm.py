"""Fuses batch normalisation into the convolution before it: the same function, but faster."""

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# In open_clip's ResNets each norm follows its convolution; other models may use other orders.
_RESNET = "ModifiedResNet"
_PAIRS = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1"))  # "0", "1": shortcuts


def fold(tower: nn.Module) -> None:
    """Change a ResNet of open_clip, in fp32, in place; leave any other model as it is."""
    if type(tower).__name__ != _RESNET:
        return
    for module in list(tower.modules()):
        for conv_name, norm_name in _PAIRS:
            conv, norm = getattr(module, conv_name, None), getattr(module, norm_name, None)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
