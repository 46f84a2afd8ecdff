"""A process of --fsdp holds its own part of the weights, from the moment it reads them."""
import json

from conftest import ROOT, make_t5, run

# prints, for each process, the memory of its own (in MiB) that a reader takes when it is opened and
# when it is spread; what the kernel maps from a file is not counted
SCRIPT = """
import argparse, json, sys
sys.path.insert(0, {root!r})
from readers import open_reader, place_reader
from utils import gather_lists, run_script, start_processes

def own_memory():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

def main(args):
    world = start_processes("")
    for i in range(2):  # the first time libraries are set up, too
        before = own_memory()
        reader = open_reader({model!r}, spread=True)
        opened = own_memory() - before
        place_reader(reader, world, True)
        spread = own_memory() - before
        if i == 0:
            del reader
    world.log(json.dumps(gather_lists([(opened, spread)], world)))

run_script(main, argparse.Namespace())
"""


def test_no_process_holds_more_than_its_part(tmp_path):
    model = make_t5(tmp_path / "model", d_model=512, d_ff=4096, num_layers=6, num_decoder_layers=6)
    size = (model / "model.safetensors").stat().st_size / 2 ** 20
    assert size > 190
    script = tmp_path / "memory.py"
    script.write_text(SCRIPT.format(root=str(ROOT), model=str(model)))
    out, _ = run(script, processes=2)
    print(size, out)
    for opened, spread in json.loads(out.splitlines()[-1]):
        assert opened < 0.1 * size
        assert spread < 0.5 * size + 40  # its half, and of each block in turn the whole


# prints for each process the MiB of copies of weights in bfloat16 that autograd keeps
KEPT = """
import argparse, sys
sys.path.insert(0, {root!r})
import torch
from readers import open_reader, place_reader
from utils import gather_lists, run_script, start_processes

def main(args):
    world = start_processes("")
    reader = open_reader({model!r}, spread=True)
    reader.set_checkpoint(True)
    place_reader(reader, world, True)
    reader.train()
    shapes = {{tuple(sorted(weight.shape)) for weight in reader.parameters()}}
    ids = torch.full((1, 8, 16), 5)
    kept = {{}}

    def note(tensor):
        if tensor.dtype == torch.bfloat16 and tuple(sorted(tensor.shape)) in shapes:
            kept[tensor.data_ptr()] = tensor.nbytes / 2 ** 20
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            reader(ids, torch.ones_like(ids).bool(), ids[:, 0, :4])
    world.log(gather_lists([sum(kept.values())], world))

run_script(main, argparse.Namespace())
"""


def test_no_process_keeps_copies_of_the_blocks_under_autocast(tmp_path):
    model = make_t5(tmp_path / "model", d_model=512, d_ff=1024)
    script = tmp_path / "kept.py"
    script.write_text(KEPT.format(root=str(ROOT), model=str(model)))
    out, _ = run(script, processes=2)
    print(out)
    assert max(json.loads(out.splitlines()[-1])) < 0.5
