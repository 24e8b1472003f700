"""`divisi keys new`: makes an API key, shows it once, and prints the line for the server's key file."""

from __future__ import annotations

import argparse
import sys

EXAMPLES = """\
example:
  divisi keys new team-a >> keys.txt                 the key is shown on the terminal, its hash goes to the file
  divisi serve /models/next --api-keys-file keys.txt
  curl http://127.0.0.1:8000/v1/models -H 'authorization: Bearer KEY'

The server reads the file again when it changes. A YAML file can limit each key, too:
  keys:
    - {name: team-a, hash: 'sha256:...', max_concurrent: 8, tokens_per_minute: 60000}
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("keys", help="make API keys")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    new = actions.add_parser(
        "new",
        help="make a key; only its hash is ever stored",
        description="Make a random API key. The key goes to standard error and is stored nowhere; the line for the "
        "server's key file, with the key's hash, goes to standard output.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    new.add_argument("name", metavar="NAME", help="whose key it is, for the log and for limits")
    new.set_defaults(run=run_new)


def run_new(args: argparse.Namespace) -> int:
    """Print a key and its line. Raises SettingsError for a name that a key file cannot hold."""
    from divisi.deploy.limits.keys import hash_key, new_key
    from divisi.deploy.settings import SettingsError

    name: str = args.name
    if not name.strip() or "#" in name or not name.isprintable() or len(name) > 128:
        raise SettingsError(f"NAME: {name[:128]!r} cannot be a key's name; use up to 128 letters, digits or dashes")
    key = new_key()
    print(f"key, shown only now: {key}", file=sys.stderr)
    print(f"{hash_key(key)} {name.strip()}")
    return 0
