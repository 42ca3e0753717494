"""The import of torchvision with and without its compiled extension."""

import subprocess
import sys

import torch

from autoprune.network.models.torchvision import import_torchvision


def test_models_transforms_and_datasets_can_be_used_after_the_import():
    torchvision = import_torchvision()
    model = torchvision.models.mobilenet_v3_small(weights=None).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    assert torchvision.datasets.CIFAR10 is not None
    assert torchvision.transforms.CenterCrop(8)(torch.zeros(3, 16, 16)).shape == (3, 8, 8)


def test_a_second_import_gives_the_same_module():
    assert import_torchvision() is import_torchvision()
    assert sys.modules["torchvision"] is import_torchvision()


def test_the_import_works_in_a_fresh_interpreter_with_warnings_as_errors_and_leaves_plain_imports_working():
    code = (
        "from autoprune.network.models.torchvision import import_torchvision\n"
        "first = import_torchvision()\n"
        "import torchvision\n"
        "assert torchvision is first\n"
        "import torch\n"
        "try:\n"
        "    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)\n"
        "except RuntimeError as error:\n"
        "    print('refused' if 'custom C++ ops' in str(error) else error)\n"
        "else:\n"
        "    print('works')\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("refused", "works")
