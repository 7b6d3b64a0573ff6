"""Who a request is from: the one place where a key becomes a tenant and rights."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.keys import TOKEN_PREFIX, ApiKey, KeyRing
from deployments.errors import AdminOnlyError, NoKeyError, WrongKeyError
from deployments.last_good import LOOK_AGAIN_S, LastGood
from storage.identity import DEFAULT_TENANT, checked_name


@dataclass(frozen=True, slots=True)
class Caller:
    """`is_admin`: may change adapters, act for any tenant, and look at the whole cluster."""

    tenant: str
    is_admin: bool

    def acting_for(self, tenant: str | None) -> str:
        """The tenant a request is about: the caller's own unless it names another.

        Raises:
            AdminOnlyError: it names another, which only an admin may.
            InvalidRequestError: not the name of a tenant.
        """
        if tenant is None or tenant == self.tenant:
            return self.tenant
        if not self.is_admin:
            raise AdminOnlyError("only an admin key may act for another tenant", param="tenant")
        return checked_name(tenant, param="tenant")


ANONYMOUS = Caller(DEFAULT_TENANT, is_admin=True)
"""This machine's own requests where no key is needed."""


class Doorkeeper:
    """Tells callers by their keys.

    Args:
        keys: those that open this door.
        allows_anonymous: requests of this machine need no key.
    """

    def __init__(self, keys: LastGood[KeyRing], *, allows_anonymous: bool) -> None:
        self._keys = keys
        self._allows_anonymous = allows_anonymous

    async def identify(self, authorization: str | None, *, is_local: bool) -> Caller:
        """Who sends this `Authorization` header.

        Where no key is needed, what is not one of ours is ignored: OpenAI's clients always send something.

        Raises:
            NoKeyError: no key was sent, and one is needed.
            WrongKeyError: the key is unknown or revoked.
            StoreUnavailableError: no keys could be read since this process began.
        """
        scheme, _, token = (authorization or "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        if self._allows_anonymous and not token.startswith(TOKEN_PREFIX):
            if is_local:
                return ANONYMOUS
            raise NoKeyError("this server answers requests without a key only from its own machine")
        if not token:
            raise NoKeyError("give an API key: the header `Authorization: Bearer flora-…`")
        key = await self._find(token)
        if key is None:
            raise WrongKeyError("this API key is not known here, or was revoked")
        return Caller(key.tenant, key.is_admin)

    async def _find(self, token: str) -> ApiKey | None:
        """A key made a moment ago opens at once: what is not on the ring is looked for anew."""
        key = (await self._keys.now()).find(token)
        if key is not None or not KeyRing.is_token(token):
            return key
        return (await self._keys.recent(LOOK_AGAIN_S)).find(token)
