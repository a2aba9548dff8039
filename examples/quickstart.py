"""Fifteen lines to copy: a model with bn_ext's batch norm, trained, saved, loaded into plain torch, folded."""

import io

import torch
from torch import nn

import bn_ext


def plain_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


model = bn_ext.convert(plain_model())  # torch's batch norms become ours; fuse would do it too
model = bn_ext.fuse(model)  # with the ReLU behind it, batch norm is one call
images, labels = torch.randn(16, 3, 8, 8), torch.randint(10, (16,))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
print(bn_ext.report(model))  # what runs on our kernels, and what is one call now

file = io.BytesIO()  # in memory: the name of a file does too
torch.save(model.state_dict(), file)
file.seek(0)
loaded = plain_model()  # of torch alone: the names in the file are the same
loaded.load_state_dict(torch.load(file))
folded = bn_ext.fold(model.eval(), images)  # for inference: batch norm goes into the convolution
