"""A federation on one machine: Flower's Grid in this process, which hands messages to the ClientApp
one client after another. No server, no Ray; nothing but the transport differs from a deployed run.
"""

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class LocalGrid(Grid):
    """Delivers messages to a ClientApp in this process; node I has the I-th settings."""

    def __init__(self, client_app, settings, run_config):
        # messages carry these numbers; Flower sets them in its own processes (pinned version)
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

    # what a Grid must have, and the server does not use
    run = property(lambda self: None)

    def set_run(self, run):
        raise NotImplementedError

    def create_message(self, *args, **options):
        raise NotImplementedError

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError
