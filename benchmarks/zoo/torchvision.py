"""Every model that torchvision lists."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import torchvision
from torchvision.models import get_model, get_model_builder, get_model_weights, list_models

from . import Case, Families

CLASSES = 7
DETECTION = r"rcnn|retinanet|fcos|ssd"
SEGMENTATION = r"^(fcn|deeplab|lraspp)"
# Side of the images for models that do not run on 64.
SIDES = {"inception": 299, "alexnet": 80, "vgg": 48, "squeezenet": 48, "maxvit": 224}
# (frames, side) for models that do not run on 8 frames of 32x32: MViT's position tables are fixed.
CLIPS = {"mvit": (16, 224), "s3d": (16, 224), "swin3d": (4, 64)}


def image(name: str) -> Case:
    """Return a model for classification or segmentation, with its auxiliary heads if it has any."""
    options: dict[str, Any] = {"weights": None}
    side = next((s for key, s in SIDES.items() if key in name), 64)
    if "googlenet" in name or "inception" in name:
        options |= {"aux_logits": True, "init_weights": True}
    if name.startswith("vit"):
        side = 56 if name.endswith("14") else 64
        options["image_size"] = side
    if "quantized" in name:
        options["quantize"] = False
    if re.match(SEGMENTATION, name):
        options |= {"weights_backbone": None}
        options |= {} if name.startswith("lraspp") else {"aux_loss": True}
    model = get_model(name, num_classes=CLASSES, **options)
    return Case(model, (torch.randn(2, 3, side, side),))


def video(name: str) -> Case:
    frames, side = next((clip for key, clip in CLIPS.items() if key in name), (8, 32))
    model = get_model(name, weights=None, num_classes=CLASSES)
    return Case(model, (torch.randn(2, 3, frames, side, side),))


def flow(name: str) -> Case:
    frames = torch.rand(2, 1, 3, 128, 128) * 2 - 1
    model = get_model(name, weights=None)
    return Case(model, tuple(frames), {"num_flow_updates": 2})


def detection(name: str) -> Case:
    """Return a detection model with targets, which train mode needs.

    Its score threshold is zero, because a random model would find nothing otherwise; it looks at
    few boxes, because a CPU without units for float16 takes minutes for the heads of many.
    """
    options: dict[str, Any] = {} if "ssd" in name else {"min_size": 64, "max_size": 96}
    score = "box_score_thresh" if "rcnn" in name else "score_thresh"
    if "rcnn" in name:
        options |= {"box_detections_per_img": 8}
        options |= {f"rpn_post_nms_top_n_{mode}": 16 for mode in ("train", "test")}
    model = get_model(
        name, weights=None, weights_backbone=None, num_classes=3, **options, **{score: 0.0}
    )
    images = [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]
    return Case(model, (images, [_target(name, *image.shape[1:]) for image in images]))


def _target(name: str, height: int, width: int) -> dict[str, torch.Tensor]:
    boxes = torch.tensor([[5.0, 8.0, 41.0, 50.0], [20.0, 4.0, 62.0, 39.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    if name.startswith("mask"):
        target["masks"] = torch.randint(0, 2, (2, height, width), dtype=torch.uint8)
    if name.startswith("keypoint"):
        points = boxes[:, None, :2] + torch.rand(2, 17, 2) * 20
        target["keypoints"] = torch.cat([points, torch.ones(2, 17, 1)], -1)
    return target


def _kind(name: str) -> str:
    if re.search(DETECTION, name):
        return "detection"
    for module in ("quantization", "video", "optical_flow", "segmentation"):
        if name in list_models(getattr(torchvision.models, module)):
            return module
    return "classification"


BUILDERS = {"video": video, "optical_flow": flow, "detection": detection}


def _models() -> Families:
    models: dict[str, dict[str, Any]] = {}
    for name in list_models():
        kind = _kind(name)
        models.setdefault(kind, {})[name] = partial(BUILDERS.get(kind, image), name)
    return models


MODELS: Families = _models()


def _smallest(models: Families) -> Families:
    """Keep one model for each of torchvision's modules: the one with the fewest parameters."""

    def parameters(name: str) -> int:
        return min(weights.meta["num_params"] for weights in get_model_weights(name))

    names = sorted((name for family in models.values() for name in family), key=parameters)
    first = {get_model_builder(name).__module__: name for name in reversed(names)}.values()
    return {
        kind: {name: build for name, build in family.items() if name in first}
        for kind, family in models.items()
    }


QUICK: Families = _smallest(MODELS)
