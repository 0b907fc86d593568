"""The API's routes: path, endpoint, and the types of query, body and answers.

Matching (app/web/routing.py), the OpenAPI document (app/api/openapi.py) and the contract test read this table.
"""

from __future__ import annotations

from app.api.balance import get_balance, get_statement, list_balance_transactions, list_currencies
from app.api.cancellations import cancel_payment
from app.api.captures import capture_payment
from app.api.client_secrets import create_client_secret
from app.api.commands import COMMAND_PROBLEMS
from app.api.create_payment import create_payment
from app.api.customers import create_customer, get_customer, list_customers, update_customer
from app.api.disputes import get_dispute, list_disputes, submit_evidence
from app.api.events import get_event, list_events
from app.api.operator_routes import OPERATOR_ROUTES
from app.api.payment_methods import detach_payment_method, list_payment_methods
from app.api.payments import get_payment, get_trace, list_payments
from app.api.problems import explain_problem, get_health, list_problems
from app.api.refunds import create_refund, get_refund, list_refunds
from app.api.schemas.balance import (
    Balance,
    BalanceTransactionList,
    BalanceTransactionsQuery,
    CurrencyList,
    StatementPage,
    StatementQuery,
)
from app.api.schemas.customers import (
    Customer,
    CustomerList,
    CustomersQuery,
    CustomerUpdate,
    MethodRemoval,
    NewCustomer,
    PaymentMethodsQuery,
    SavedPaymentMethod,
    SavedPaymentMethodList,
)
from app.api.schemas.disputes import Dispute, DisputeList, DisputesQuery, SubmittedEvidence
from app.api.schemas.events import Event, EventList, EventsQuery
from app.api.schemas.expanded import ExpandedDispute, ExpandedPayment, ExpandedRefund, PartQuery, PaymentQuery
from app.api.schemas.payments import (
    ClientSecret,
    NewCancellation,
    NewCapture,
    NewClientSecret,
    NewPayment,
    Payment,
    PaymentList,
    PaymentsQuery,
    PaymentUpdate,
    Trace,
)
from app.api.schemas.problems import Health, ProblemType
from app.api.schemas.refunds import NewRefund, Refund, RefundList, RefundsQuery
from app.api.updates import update_payment
from app.api.webhook_endpoint_routes import WEBHOOK_ENDPOINT_ROUTES
from app.web.auth import KEY_PROBLEMS
from app.web.routing import Route

READ_PROBLEMS = ("invalid-request", "unauthenticated", *KEY_PROBLEMS, "not-found", "overloaded", "unavailable")
LIST_PROBLEMS = ("invalid-request", "unauthenticated", *KEY_PROBLEMS, "overloaded", "unavailable")
CREATE_PAYMENT_PROBLEMS = (
    "invalid-request",
    "idempotency-key-missing",
    "unauthenticated",
    *KEY_PROBLEMS,
    "merchant-suspended",
    "provider-account-refused",
    "limit-exceeded",
    "velocity-exceeded",
    "reference-taken",
    "too-large",
    "not-json",
    "unsupported-encoding",
    "idempotency-key-reused",
    "overloaded",
    "unavailable",
)
CLIENT_SECRET_PROBLEMS = (
    *(name for name in COMMAND_PROBLEMS if not name.startswith("idempotency-key")),
    "merchant-suspended",
    "provider-unavailable",
)

PAYMENT_ROUTES = [
    Route(
        "POST",
        "/v1/payments",
        create_payment,
        {201: Payment},
        CREATE_PAYMENT_PROBLEMS,
        body=NewPayment,
        scope="payments:write",
        takes_wait=True,
        is_fast=True,
    ),
    Route("GET", "/v1/payments", list_payments, {200: PaymentList}, LIST_PROBLEMS, query=PaymentsQuery, scope="read"),
    Route(
        "GET",
        "/v1/payments/{payment_id}",
        get_payment,
        {200: ExpandedPayment},
        READ_PROBLEMS,
        query=PaymentQuery,
        scope="read",
        takes_wait=True,
    ),
    Route(
        "POST",
        "/v1/payments/{payment_id}",
        update_payment,
        {200: Payment},
        tuple(name for name in COMMAND_PROBLEMS if name != "wrong-state"),
        body=PaymentUpdate,
        scope="payments:write",
    ),
    Route("GET", "/v1/payments/{payment_id}/trace", get_trace, {200: Trace}, READ_PROBLEMS, scope="read"),
    Route(
        "POST",
        "/v1/payments/{payment_id}/capture",
        capture_payment,
        {202: Payment},
        (*COMMAND_PROBLEMS, "merchant-suspended"),
        body=NewCapture,
        scope="payments:write",
        takes_wait=True,
    ),
    Route(
        "POST",
        "/v1/payments/{payment_id}/cancel",
        cancel_payment,
        {200: Payment, 202: Payment},
        COMMAND_PROBLEMS,
        body=NewCancellation,
        scope="payments:write",
        takes_wait=True,
    ),
    Route(
        "POST",
        "/v1/payments/{payment_id}/client_secret",
        create_client_secret,
        {200: ClientSecret},
        CLIENT_SECRET_PROBLEMS,
        body=NewClientSecret,
        scope="payments:write",
        is_secret=True,
    ),
    Route(
        "POST",
        "/v1/payments/{payment_id}/refunds",
        create_refund,
        {201: Refund},
        (*COMMAND_PROBLEMS, "balance-too-low"),
        body=NewRefund,
        scope="refunds:write",
        takes_wait=True,
    ),
]

CUSTOMER_ROUTES = [
    Route(
        "POST",
        "/v1/customers",
        create_customer,
        {201: Customer},
        tuple(name for name in COMMAND_PROBLEMS if name not in ("not-found", "wrong-state")),
        body=NewCustomer,
        scope="payments:write",
    ),
    Route(
        "GET", "/v1/customers", list_customers, {200: CustomerList}, LIST_PROBLEMS, query=CustomersQuery, scope="read"
    ),
    Route("GET", "/v1/customers/{customer_id}", get_customer, {200: Customer}, READ_PROBLEMS, scope="read"),
    Route(
        "POST",
        "/v1/customers/{customer_id}",
        update_customer,
        {200: Customer},
        COMMAND_PROBLEMS,
        body=CustomerUpdate,
        scope="payments:write",
    ),
    Route(
        "GET",
        "/v1/customers/{customer_id}/payment_methods",
        list_payment_methods,
        {200: SavedPaymentMethodList},
        ("invalid-request", *READ_PROBLEMS),
        query=PaymentMethodsQuery,
        scope="read",
    ),
    Route(
        "DELETE",
        "/v1/customers/{customer_id}/payment_methods/{payment_method_id}",
        detach_payment_method,
        {200: SavedPaymentMethod},
        tuple(name for name in COMMAND_PROBLEMS if name != "wrong-state"),
        body=MethodRemoval,
        scope="payments:write",
    ),
]

MERCHANT_ROUTES = [
    *PAYMENT_ROUTES,
    *CUSTOMER_ROUTES,
    *WEBHOOK_ENDPOINT_ROUTES,
    Route("GET", "/v1/refunds", list_refunds, {200: RefundList}, LIST_PROBLEMS, query=RefundsQuery, scope="read"),
    Route(
        "GET",
        "/v1/refunds/{refund_id}",
        get_refund,
        {200: ExpandedRefund},
        READ_PROBLEMS,
        query=PartQuery,
        scope="read",
        takes_wait=True,
    ),
    Route("GET", "/v1/disputes", list_disputes, {200: DisputeList}, LIST_PROBLEMS, query=DisputesQuery, scope="read"),
    Route(
        "GET",
        "/v1/disputes/{dispute_id}",
        get_dispute,
        {200: ExpandedDispute},
        READ_PROBLEMS,
        query=PartQuery,
        scope="read",
    ),
    Route(
        "POST",
        "/v1/disputes/{dispute_id}/evidence",
        submit_evidence,
        {202: Dispute},
        COMMAND_PROBLEMS,
        body=SubmittedEvidence,
        scope="disputes:write",
    ),
    Route(
        "GET",
        "/v1/balance",
        get_balance,
        {200: Balance},
        LIST_PROBLEMS,
        scope="read",
    ),
    Route(
        "GET",
        "/v1/balance/transactions",
        list_balance_transactions,
        {200: BalanceTransactionList},
        LIST_PROBLEMS,
        query=BalanceTransactionsQuery,
        scope="read",
    ),
    Route(
        "GET",
        "/v1/statements",
        get_statement,
        {200: StatementPage},
        READ_PROBLEMS,
        query=StatementQuery,
        scope="read",
    ),
    Route(
        "GET",
        "/v1/currencies",
        list_currencies,
        {200: CurrencyList},
        LIST_PROBLEMS,
        scope="read",
    ),
    Route(
        "GET",
        "/v1/events",
        list_events,
        {200: EventList},
        LIST_PROBLEMS,
        query=EventsQuery,
        scope="read",
        takes_wait=True,
    ),
    Route("GET", "/v1/events/{event_id}", get_event, {200: Event}, READ_PROBLEMS, scope="read"),
]

PUBLIC_ROUTES = [
    Route("GET", "/problems", list_problems, {200: list[ProblemType]}, is_public=True),
    Route("GET", "/problems/{name}", explain_problem, {200: ProblemType}, ("not-found",), is_public=True),
    Route(
        "GET",
        "/health",
        get_health,
        {200: Health},
        (
            "overloaded",
            "unavailable",
        ),
        is_public=True,
    ),
]

ROUTES = [*MERCHANT_ROUTES, *OPERATOR_ROUTES, *PUBLIC_ROUTES]
