import onnxruntime
import torch
from torch import nn

import syncbn

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
syncbn.convert_sync_batchnorm(model)
model(torch.randn(6, 3, 8, 8))  # training
x = torch.randn(2, 3, 8, 8)

model.eval()
sizes = ({0: "batch"},)
program = torch.onnx.export(
    model, (x,), dynamo=True, verbose=False, dynamic_shapes=sizes
)
program.save("model.onnx")

session = onnxruntime.InferenceSession("model.onnx")
inputs = {session.get_inputs()[0].name: x.numpy()}
(y,) = session.run(None, inputs)
print([node.op_type for node in program.model.graph])
same = torch.allclose(torch.from_numpy(y), model(x), atol=1e-6)
print("as the model:", same)
