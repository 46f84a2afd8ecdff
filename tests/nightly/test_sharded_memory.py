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
