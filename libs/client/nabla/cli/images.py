"""The image that a job runs in, as the command line names it."""

from __future__ import annotations

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
        "--container-user", default="", metavar="USER", help="A user of the image; the platform's own when left out."
    ),
    click.option("--registry-username", default="", metavar="NAME", help="For an image that is not public."),
    click.option(
        "--registry-password", default="", metavar="secret:NAME", help="Its password or token, kept as a secret."
    ),
)


def container_of(image: str, user: str, username: str, password: str, env_choice: str) -> Container:
    """Args:
    env_choice: the environment that --env names, which is the node's and not for an image.
    """
    if not image:
        if user or username or password:
            raise click.UsageError("A user or credentials are for an image: name it with --container IMAGE.")
        return Container()
    if env_choice not in ("", "default"):
        raise click.UsageError(f"An image brings its own Python: leave out --env {env_choice}, or --container.")
    return Container(image=image, user=user, registry_username=username, registry_password=password)
