"""All constants of the network in time, which a backend needs besides weights and input currents."""

from dataclasses import dataclass, field

from models.constants import check_bounds, constant
from models.neurons import LIFNeuron
from models.plasticity import HebbianRule

# The recorded populations, as `rates` and `activity` name them. The first two and `write_...` are those of storing.
POPULATIONS = (
    "features_encoded",
    "labels_encoded",
    "query_encoded",
    "write_key",
    "write_value",
    "read_key",
    "read_value",
)


@dataclass(frozen=True)
class Dynamics:
    """Constants under the names of the command-line options; `neuron` and `rule` hold their own constants."""

    num_time_steps: int = constant(100, low=1)  # T, time steps (ms) for which each input is held
    readout_delay: int = constant(1, low=1, high=10**6)  # delay of the feedback from values to keys while reading, ms
    memory_feedback: float = constant(0.2)  # strength of the memory's current to the value neurons while writing
    readout_steps: int = constant(30, low=1)  # number of final reading steps whose value spikes are summed for the output
    neuron: LIFNeuron = field(default_factory=LIFNeuron)
    rule: HebbianRule = field(default_factory=HebbianRule)

    def __post_init__(self) -> None:
        check_bounds(self)
