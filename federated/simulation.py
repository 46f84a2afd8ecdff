"""A federation on one machine: a Grid of Flower that calls the ClientApp in this process, one
client after another. It needs neither a server nor Ray; only the transport differs from a deployed
run.
"""

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class LocalGrid(Grid):
    """Deliver messages to a ClientApp in this process; node i has the i-th settings."""

    def __init__(self, client_app, settings, run_config):
        # Messages need these numbers, which Flower sets in its own processes. They are not public:
        # requirements-federated.txt pins the version.
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self.client_app = client_app
        self.contexts = {number: Context(run_id=1, node_id=number, node_config=client_settings,
                                         state=RecordDict(), run_config=run_config)
                         for number, client_settings in enumerate(settings, 1)}

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout=None):
        return [self.client_app(message, self.contexts[message.metadata.dst_node_id])
                for message in messages]

    # abstract in Grid, and not used by federated/server.py
    run = property(lambda self: None)

    def set_run(self, run):
        raise NotImplementedError

    def create_message(self, *args, **options):
        raise NotImplementedError

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError
