"""`divisi completion`: scripts that complete commands and flags in bash, zsh and fish, made from the parsers."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass

INSTALL = """\
to install:
  bash   divisi completion bash > ~/.local/share/bash-completion/completions/divisi
  zsh    divisi completion zsh > "${fpath[1]}/_divisi"        (any folder of $fpath; then start a new shell)
  fish   divisi completion fish > ~/.config/fish/completions/divisi.fish

for this shell only:
  source <(divisi completion bash)                           (zsh the same; fish: divisi completion fish | source)

Do it again after an update: the script holds the commands of this version.
"""


@dataclass(frozen=True)
class Flag:
    """An option of a command."""

    names: tuple[str, ...]
    takes_value: bool
    choices: tuple[str, ...]
    help: str


@dataclass(frozen=True)
class Command:
    """A command by its words (`("checkpoint", "random")`; none for `divisi` itself), and what may follow it."""

    words: tuple[str, ...]
    help: str
    flags: tuple[Flag, ...]
    subcommands: tuple[str, ...]
    choices: tuple[str, ...]
    """Of its positional arguments."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand. The parser of `divisi` itself is put in by `set_defaults(root=...)`."""
    parser = commands.add_parser(
        "completion",
        help="print a shell's completion script",
        description="Print a script that completes divisi's commands and flags. Files complete where a flag takes one.",
        epilog=INSTALL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="which shell")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    print(SCRIPTS[args.shell](list(walk(args.root))), end="")
    return 0


def walk(parser: argparse.ArgumentParser, words: tuple[str, ...] = (), help_text: str = "") -> Iterator[Command]:
    """Every command below `parser`, itself first."""
    flags: list[Flag] = []
    choices: list[str] = []
    below = None
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below = action
        elif action.option_strings:
            takes_value = action.nargs != 0
            values = tuple(map(str, action.choices or ()))
            text = "" if action.help == argparse.SUPPRESS else " ".join((action.help or "").split())
            flags.append(Flag(tuple(action.option_strings), takes_value, values, text % {"default": action.default}))
        else:
            choices += map(str, action.choices or ())
    names = () if below is None else tuple(below.choices)
    yield Command(words, help_text, tuple(flags), names, tuple(choices))
    if below is not None:
        texts = {action.dest: action.help or "" for action in below._choices_actions}
        for name, child in below.choices.items():
            yield from walk(child, (*words, name), texts.get(name, ""))


def bash(commands: list[Command]) -> str:
    """A function for `complete -F`: finds the command by its words, then offers values, flags or files."""
    tree, values, offers = [], [], []
    for command in commands:
        key = " ".join(command.words)
        below = [_quote(" ".join((*command.words, name))) for name in command.subcommands]
        tree += [f"{words}) command={words} ;;" for words in below]
        names = " ".join(name for flag in command.flags for name in flag.names)
        words = " ".join((*command.subcommands, *command.choices))
        offers.append(f"{_quote(key)}) flags={_quote(names)} words={_quote(words)} ;;")
        for flag in command.flags:
            if flag.takes_value:
                pattern = "|".join(_quote(f"{key}:{name}") for name in flag.names)
                values.append(f"{pattern}) values={_quote(' '.join(flag.choices))} takes=1 ;;")
    return _BASH.format(
        steps="\n            ".join(tree), values="\n        ".join(values), offers="\n        ".join(offers)
    )


def zsh(commands: list[Command]) -> str:
    """The bash function under zsh's own bridge, so that there is one logic to trust."""
    return (
        "#compdef divisi\n"
        "autoload -U +X compinit bashcompinit\n"
        "(( $+functions[compdef] )) || compinit\n"
        "bashcompinit\n" + bash(commands)
    )


def fish(commands: list[Command]) -> str:
    """One `complete` line for each command and flag."""
    lines = ["complete -c divisi -f"]
    for command in commands:
        here = _fish_condition(command)
        texts = {other.words: other.help for other in commands}
        for name in command.subcommands:
            lines.append(f"complete -c divisi -n {here} -a {_quote(name)} -d {_quote(texts[*command.words, name])}")
        if command.choices:
            lines.append(f"complete -c divisi -n {here} -a {_quote(' '.join(command.choices))}")
        for flag in command.flags:
            names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in flag.names)
            value = f" -x -a {_quote(' '.join(flag.choices))}" if flag.choices else " -r -F" if flag.takes_value else ""
            lines.append(f"complete -c divisi -n {here} {names}{value} -d {_quote(flag.help)}")
        if command.words and not command.subcommands and not command.choices:
            lines.append(f"complete -c divisi -n {here} -F")
    return "\n".join(lines) + "\n"


def _fish_condition(command: Command) -> str:
    seen = [f"__fish_seen_subcommand_from {word}" for word in command.words]
    if command.subcommands:
        seen.append(f"not __fish_seen_subcommand_from {' '.join(command.subcommands)}")
    return _quote("; and ".join(seen)) if seen else "true"


def _quote(text: str) -> str:
    return shlex.quote(text)


_BASH = """\
_divisi() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}}
    local command='' flags='' words='' values='' takes='' i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "${{command:+$command }}${{COMP_WORDS[i]}}" in
            {steps}
        esac
    done
    case "$command:$previous" in
        {values}
    esac
    case "$command" in
        {offers}
    esac
    COMPREPLY=()
    if [[ -n $takes ]]; then
        if [[ -n $values ]]; then
            COMPREPLY=($(compgen -W "$values" -- "$current"))
        else
            compopt -o filenames 2>/dev/null
            COMPREPLY=($(compgen -f -- "$current"))
        fi
    elif [[ $current == -* ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$current"))
    elif [[ -n $words ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$current"))
    else
        compopt -o filenames 2>/dev/null
        COMPREPLY=($(compgen -f -- "$current"))
    fi
}}
complete -F _divisi divisi
"""

SCRIPTS: dict[str, Callable[[list[Command]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
