"""`peftgraph completion`: prints the script by which a shell completes commands and options.

The script is made from the parser, and holds all words, so that a completion starts no Python.
"""

from __future__ import annotations

import inspect
import shlex
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Annotated, Any

import typer


class Shell(StrEnum):
    """A shell with completion."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@dataclass(frozen=True)
class Word:
    """An option or a command.

    Attributes:
        names: how it is written.
        help: its first sentence.
        takes_value: whether a value follows it.
        choices: the values it takes, if they are words.
    """

    names: tuple[str, ...]
    help: str
    takes_value: bool = False
    choices: tuple[str, ...] = ()


Commands = dict[str, tuple[str, list[Word]]]  # help and options, by the name of the command; "" for the program itself


def completion(
    ctx: typer.Context,
    shell: Annotated[Shell, typer.Argument(help="The shell.")],
) -> None:
    """Print the script that makes a shell complete commands, options and paths.

    For bash, write eval "$(peftgraph completion bash)" in ~/.bashrc; for zsh the same with zsh in ~/.zshrc, after
    compinit; for fish, peftgraph completion fish > ~/.config/fish/completions/peftgraph.fish.
    """
    make = {Shell.BASH: bash_script, Shell.ZSH: zsh_script, Shell.FISH: fish_script}[shell]
    typer.echo("\n".join(make(commands_of(ctx.find_root().command))))


def commands_of(group: Any) -> Commands:
    """Return the words of a program's parser."""
    found: Commands = {"": ("", list(_options(group, {})))}
    for name, command in group.commands.items():
        hints = typing.get_type_hints(inspect.unwrap(command.callback))
        found[name] = (_sentence(command.help), list(_options(command, hints)))
    return found


def _options(command: Any, hints: dict[str, Any]) -> Iterator[Word]:
    for one in command.params:
        hint = hints.get(one.name)
        choices = tuple(str(item.value) for item in hint) if isinstance(hint, type) and issubclass(hint, Enum) else ()
        if one.param_type_name == "option" and not one.hidden:
            yield Word((*one.opts, *one.secondary_opts), _sentence(one.help), not one.is_flag, choices)
        elif choices:  # the words of an argument
            yield Word(choices, _sentence(one.help))
    yield Word(("--help",), "Show the help and exit.")


def _sentence(text: str | None) -> str:
    """Return the first sentence of a help text, on one line."""
    return " ".join((text or "").split()).partition(". ")[0].rstrip(".")


def _names(words: list[Word]) -> str:
    return " ".join(name for word in words for name in word.names)


def _command_names(commands: Commands) -> list[str]:
    return [name for name in commands if name]


def bash_script(commands: Commands) -> Iterator[str]:
    """Yield the lines of bash's script."""
    names = _command_names(commands)
    yield "_peftgraph() {"
    yield "  local cur=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command= word options= values="
    yield '  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do'
    yield f"    case $word in {'|'.join(names)}) command=$word; break ;; esac"
    yield "  done"
    yield '  case "$command $before" in'
    for name, (_, words) in commands.items():
        for word in (one for one in words if one.takes_value):
            patterns = "|".join(f'"{name} {option}"' for option in word.names)
            yield f"    {patterns}) {_compgen(shlex.quote(' '.join(word.choices)))}; return ;;"
    yield "  esac"
    yield "  case $command in"
    for name, (_, words) in commands.items():
        arguments = [one for one in words if not one.names[0].startswith("-")]
        values = names if not name else [_names(arguments)]
        options = _names([one for one in words if one not in arguments])
        yield f'    "{name}") options={shlex.quote(options)} values={shlex.quote(" ".join(values))} ;;'
    yield "  esac"
    yield f"  if [[ $cur == -* ]]; then {_compgen(chr(34) + '$options' + chr(34))}"
    yield f"  else {_compgen(chr(34) + '$values' + chr(34))}; fi"
    yield "}"
    yield "complete -o bashdefault -o default -F _peftgraph peftgraph"


def _compgen(words: str) -> str:
    return f'COMPREPLY=($(compgen -W {words} -- "$cur"))'


def zsh_script(commands: Commands) -> Iterator[str]:
    """Yield the lines of zsh's script."""
    names = _command_names(commands)
    yield "#compdef peftgraph"
    yield "_peftgraph() {"
    yield "  local command= word"
    yield "  local -a words_here names"
    yield '  for word in "${(@)words[2,CURRENT-1]}"; do'
    yield f"    case $word in ({'|'.join(names)}) command=$word; break ;; esac"
    yield "  done"
    yield '  case "$command ${words[CURRENT-1]}" in'
    for name, (_, words) in commands.items():
        for word in (one for one in words if one.takes_value):
            patterns = "|".join(f'"{name} {option}"' for option in word.names)
            action = f"names=({' '.join(word.choices)}); _describe value names" if word.choices else "_files"
            yield f"    ({patterns}) {action}; return ;;"
    yield "  esac"
    yield '  case "$command" in'
    for name, (_, words) in commands.items():
        described = [shlex.quote(_described(option, word.help)) for word in words for option in word.names]
        yield f'    ("{name}") words_here=({" ".join(described)}) ;;'
    yield "  esac"
    yield f"  names=({' '.join(shlex.quote(_described(name, commands[name][0])) for name in names)})"
    yield "  if [[ -z $command && $PREFIX != -* ]]; then _describe command names"
    yield "  elif [[ $PREFIX == -* ]]; then _describe option words_here"
    yield "  else _files; fi"
    yield "}"
    yield "compdef _peftgraph peftgraph"


def _described(name: str, help: str) -> str:
    return f"{name}:{help.replace(':', ' -')}"


def fish_script(commands: Commands) -> Iterator[str]:
    """Yield the lines of fish's script."""
    for name, (help, words) in commands.items():
        if name:
            yield f"complete -c peftgraph -n __fish_use_subcommand -f -a {name} -d {shlex.quote(help)}"
        where = f"'__fish_seen_subcommand_from {name}'" if name else "__fish_use_subcommand"
        for word in words:
            options = [_fish_option(one) for one in word.names if one.startswith("-")]
            arguments = [f"-f -a {shlex.quote(_names([word]))}"] if not options else []
            values = [f"-x -a {shlex.quote(' '.join(word.choices))}"] if word.choices else ["-r"] * word.takes_value
            rest = " ".join([*options, *arguments, *values])
            yield f"complete -c peftgraph -n {where} {rest} -d {shlex.quote(word.help)}"


def _fish_option(name: str) -> str:
    return f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
