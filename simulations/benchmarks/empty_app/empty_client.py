"""Answers at once."""

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """An answer of nothing."""
    return Message(RecordDict({"empty": ConfigRecord()}), reply_to=message)
