"""Split one file of records into one file per simulated client."""
import json
import os
from collections import defaultdict

import numpy as np

from records.files import new_file
from records.reading import read_json
from utils import InputError, shorten


def split_file(path, kind, num_clients, folder, topic_field, alpha, seed):
    """Write FOLDER/client1.jsonl, ... Return their paths; records keep the order of the file.

    kind: iid (at random), topic (all records of a topic go to one client) or dirichlet (each
    topic's shares are drawn from Dirichlet(alpha): Hsu et al., arXiv 1909.06335, section 3).
    Raises InputError for a record without a topic, and if a client would get no record.
    """
    records = read_json(path)
    rng = np.random.default_rng(seed)
    if kind == "iid":
        owners = rng.permutation(len(records)) % num_clients
    else:
        topics = group_topics(records, topic_field)
        if kind == "topic":
            owners = deal_topics(topics, num_clients, len(records))
        else:
            owners = deal_shares(topics, num_clients, len(records), rng, alpha)
    counts = np.bincount(owners, minlength=num_clients)
    if not counts.all():
        raise InputError(f"{path}: client {counts.argmin() + 1} of {num_clients} gets no record by "
                         f"--split {kind}; use fewer clients, another split or another seed")
    paths = [os.path.join(folder, f"client{client + 1}.jsonl") for client in range(num_clients)]
    if os.path.realpath(path) in map(os.path.realpath, paths):
        raise InputError(f"{path}: a client's part would replace this file; choose another OUT")
    for client, client_path in enumerate(paths):
        with new_file(client_path) as file:
            file.writelines(json.dumps(record) + "\n" for (record, _), owner
                            in zip(records, owners) if owner == client)
    return paths


def group_topics(records, field):
    """Return {topic: positions of its records}, the largest topic first.

    Raises InputError for a record without a topic.
    """
    topics = defaultdict(list)
    for position, (record, location) in enumerate(records):
        topic = record.get(field) if isinstance(record, dict) else None
        if not isinstance(topic, (str, int)):
            raise InputError(f"{location}: --split needs a topic in the field {field!r}, got "
                             f"{shorten(topic)}; name the field with --topic_field, or use "
                             "--split iid")
        topics[topic].append(position)
    return dict(sorted(topics.items(), key=lambda item: (-len(item[1]), str(item[0]))))


def deal_topics(topics, num_clients, num_records):
    """Return the client of each record: each topic goes to the client with the fewest records."""
    owners = np.zeros(num_records, dtype=int)
    sizes = [0] * num_clients
    for positions in topics.values():
        client = sizes.index(min(sizes))
        owners[positions] = client
        sizes[client] += len(positions)
    return owners


def deal_shares(topics, num_clients, num_records, rng, alpha):
    """Return the client of each record: each topic is divided by shares from Dirichlet(alpha)."""
    owners = np.zeros(num_records, dtype=int)
    for positions in topics.values():
        shares = rng.dirichlet([alpha] * num_clients)
        ends = np.round(np.cumsum(shares) * len(positions)).astype(int)
        parts = np.split(rng.permutation(positions), ends[:-1])
        for client, part in enumerate(parts):
            owners[part] = client
    return owners
