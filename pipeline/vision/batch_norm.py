"""Fuses batch normalisation into the convolution before it: the same function, but faster.

pico-clip in batches of 16 on one CPU core is 1.5 to 2 times as fast.
"""

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Module class -> its convolutions, each with the norm that follows it. Other models may use other
# orders, so only towers of these kinds are changed.
_RESNET = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
_TOWERS = {
    "ModifiedResNet": {  # of open_clip
        "ModifiedResNet": _RESNET,
        "Bottleneck": _RESNET,
        "Sequential": (("0", "1"),),  # shortcuts
    },
    "EfficientNet": {  # of timm; its norms end in an activation
        "EfficientNet": (("conv_stem", "bn1"), ("conv_head", "bn2")),
        "DepthwiseSeparableConv": (("conv_dw", "bn1"), ("conv_pw", "bn2")),
        "InvertedResidual": (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
    },
}


def fold(tower: nn.Module) -> None:
    """Change a tower in fp32 in place if it is a ResNet of open_clip or an EfficientNet of timm."""
    trunk = getattr(tower, "trunk", tower)  # open_clip holds a model of timm there
    pairs = _TOWERS.get(type(trunk).__name__, {})
    for module in list(trunk.modules()):
        for conv_name, norm_name in pairs.get(type(module).__name__, ()):
            conv, norm = getattr(module, conv_name, None), getattr(module, norm_name, None)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, getattr(norm, "act", nn.Identity()))
