"""A static server of a folder with range requests: web_server.py FOLDER PORT."""

import sys

from aiohttp import web


async def forbidden(request: web.Request) -> web.Response:
    raise web.HTTPForbidden


def main() -> None:
    app = web.Application()
    app.router.add_get("/forbidden/{rest:.*}", forbidden)
    app.router.add_static("/", sys.argv[1])
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[2]), print=None)


if __name__ == "__main__":
    main()
