"""Use the network as a library: store your own vectors, recall them, look inside, train it in your own loop, save it.

python -m examples.use_as_library
"""

import sys

import torch
from torch.nn.functional import cross_entropy

import models
from utils import checkpoints


def recall(path: str) -> None:
    """Store 20 vectors of one's own in a trained network, and ask for the label of each."""
    model = checkpoints.load_model(path)  # fast; with backend="reference" it is plain PyTorch, which records more
    vectors, labels = torch.rand(20, 10), torch.randperm(20)
    with torch.no_grad():  # one sample per query: the same pairs, another question
        output = model(vectors.expand(20, -1, -1), labels.expand(20, -1), query=vectors)
    print(f"{int((output.logits.argmax(1) == labels).sum())} of 20 vectors recalled")

    model = checkpoints.load_model(path, backend="reference")
    with torch.no_grad():
        activity = model(vectors[None], labels[None], query=vectors[:1], record=True).activity
    memory, spikes, membrane = activity["memory"][0], activity["write_key"][0], activity["membranes"]["read_value"][0]
    print(f"memory: {' x '.join(map(str, memory.shape))} weights (values x keys), {int((memory > 0.01).sum())} above 0.01")
    print(f"keys while storing: {' x '.join(map(str, spikes.shape))} (ms x neurons), {int(spikes.sum())} spikes")
    print(f"membranes of the values while recalling: up to {membrane.max():.3f} (threshold {model.dynamics.neuron.thr})")


def train(path: str, steps: int) -> None:
    """Train a small network with one's own data, optimizer and loop. Evaluation and the plot script take what is saved."""
    options = {"sequence_length": 2, "num_classes": 3, "num_time_steps": 50, "embedding_size": 32, "memory_size": 32}
    model = models.build_model(options)
    optimizer = torch.optim.RAdam(model.parameters(), lr=1e-2)
    for step in range(steps):
        features, labels = torch.rand(64, 2, 10), torch.rand(64, 3).argsort(1)[:, :2]  # no label twice in a sample
        n, asked = torch.arange(64), torch.randint(2, (64,))
        output, answer = model(features, labels, query=features[n, asked]), labels[n, asked]
        loss = cross_entropy(output.logits, answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            accuracy = (output.logits.argmax(1) == answer).float().mean()
            print(f"step {step:3d}  loss {loss.item():.3f}  accuracy {100 * accuracy:.0f} %")
    checkpoints.save_model(path, model, options)
    print(f"saved; python memorizing_associations_task.py --resume {path} --evaluate tests it")


if __name__ == "__main__":
    torch.manual_seed(1)
    pretrained, steps = sys.argv[1:] or ("pretrained/recipe-sequence_length20-seed3.pth.tar", "800")
    recall(pretrained)
    train("my_network.pth.tar", int(steps))
