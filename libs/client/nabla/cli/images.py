"""The image that a job runs in, as the command line names it."""

from __future__ import annotations

from dataclasses import dataclass

import click

from nabla.objects import Container

CONTAINER_OPTIONS = (
    click.option(
        "--container",
        default="",
        metavar="IMAGE",
        help="Run in this container image, with its own Python, in place of the node's system.",
    ),
    click.option(
        "--dockerfile",
        default="",
        is_flag=False,
        flag_value="Dockerfile",
        metavar="[PATH]",
        help="Build the image on the node from this Dockerfile of the workspace (Dockerfile or Containerfile when no "
        "PATH is given), once for the same content.",
    ),
    click.option(
        "--build-arg", "build_args", multiple=True, metavar="NAME=VALUE", help="For an ARG of the Dockerfile."
    ),
    click.option(
        "--container-user", default="", metavar="USER", help="A user of the image; the platform's own when left out."
    ),
    click.option("--registry-username", default="", metavar="NAME", help="For an image that is not public."),
    click.option(
        "--registry-password", default="", metavar="secret:NAME", help="Its password or token, kept as a secret."
    ),
)


@dataclass(frozen=True)
class ImageSaid:
    """What the command line said of the image."""

    container: str
    dockerfile: str
    build_args: tuple[str, ...]
    user: str
    registry_username: str
    registry_password: str


def container_of(said: ImageSaid, env_choice: str) -> Container:
    """Args:
    env_choice: the environment that --env names, which is the node's and not for an image.
    """
    if said.build_args and not said.dockerfile:
        raise click.UsageError("--build-arg is for a Dockerfile: name it with --dockerfile.")
    if said.container and said.dockerfile:
        raise click.UsageError("--container names an image and --dockerfile builds one: leave one of them out.")
    if not said.container and not said.dockerfile:
        if said.user or said.registry_username or said.registry_password:
            raise click.UsageError("A user or credentials are for an image: name it with --container IMAGE.")
        return Container()
    if env_choice not in ("", "default"):
        what = "--container" if said.container else "--dockerfile"
        raise click.UsageError(f"An image brings its own Python: leave out --env {env_choice}, or {what}.")
    return Container(
        image=said.container,
        dockerfile=said.dockerfile,
        user=said.user,
        registry_username=said.registry_username,
        registry_password=said.registry_password,
        build_args=dict(map(_argument, said.build_args)),
    )


def _argument(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise click.BadParameter(f"{text!r} is not NAME=VALUE.", param_hint="--build-arg")
    return name, value
