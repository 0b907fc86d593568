-- Views for analysts. They are stable: new columns are added at the end only. Amounts are minor units, time is UTC.

create or replace view report.payments as
select
    payments.id,
    payments.merchant_id,
    merchants.name as merchant_name,
    payments.state,
    surety.payment_status(states.status, payments.rail) as status,
    payments.version,
    payments.amount_minor,
    payments.captured_minor,
    payments.refunded_minor,
    payments.at_risk_minor,
    payments.reversed_minor,
    payments.currency,
    payments.rail,
    payments.capture_method,
    payments.reference,
    payments.provider,
    payments.provider_account,
    payments.provider_id,
    payments.failure ->> 'code' as failure_code,
    payments.created_at,
    payments.updated_at
from surety.payments
inner join surety.merchants on payments.merchant_id = merchants.id
inner join surety.states on payments.state = states.state;

comment on view report.payments is 'One row per payment, as it is now.';

create or replace view report.steps as
select
    steps.payment_id,
    steps.version,
    steps.from_state,
    steps.to_state,
    steps.cause,
    steps.implied,
    steps.actor,
    steps.at
from surety.steps;

comment on view report.steps is 'Every step of every payment, in order of version.';

create or replace view report.transfers as
select
    transfers.posting_id,
    transfers.leg,
    postings.cause,
    postings.rule,
    postings.payment_id,
    transfers.debit_account,
    transfers.credit_account,
    transfers.amount_minor,
    transfers.currency,
    postings.at
from ledger.transfers
inner join ledger.postings on transfers.posting_id = postings.id;

comment on view report.transfers is 'The ledger: one debit, one credit, one positive amount per row, with its cause.';

create or replace view report.merchant_balances as
select
    accounts.owner_id as merchant_id,
    accounts.kind as account,
    accounts.currency,
    balances.balance_minor
from ledger.balances
inner join ledger.accounts on balances.account_id = accounts.id;

comment on view report.merchant_balances is
'Merchants'' balances by account: pending (not settled), available, disputed, reserved_for_refunds,
reserved_for_payouts. Credits minus debits.';

create or replace view report.discrepancies as
select
    discrepancies.id,
    discrepancies.kind,
    discrepancies.subject,
    discrepancies.occurrence,
    discrepancies.severity,
    discrepancies.payment_id,
    discrepancies.merchant_id,
    discrepancies.currency,
    discrepancies.detail,
    discrepancies.fields,
    discrepancies.source_here,
    discrepancies.source_there,
    discrepancies.first,
    discrepancies.opened_at,
    discrepancies.seen_again,
    discrepancies.seen_again_at,
    discrepancies.assignee,
    discrepancies.snoozed_until,
    discrepancies.note,
    discrepancies.closed_at,
    discrepancies.closed_as,
    discrepancies.closed_by,
    discrepancies.closed_because
from surety.discrepancies;

comment on view report.discrepancies is
'Reconciliation breaks, open while closed_at is null, each with its differing fields and the ids of both records.';

create or replace view report.payouts as
select
    payouts.id,
    payouts.provider,
    payouts.account,
    payouts.status,
    payouts.was_paid,
    payouts.amount_minor,
    payouts.currency,
    payouts.is_automatic,
    payouts.trace_id,
    payouts.arrival_on,
    payouts.failure_code,
    payouts.line_count,
    payouts.lines_minor,
    payouts.created_at
from surety.payouts;

comment on view report.payouts is
'The provider''s payouts to our bank. lines_minor is the sum of the nets of the balance transactions that it pays out,
null until they are read.';

create or replace view report.payout_lines as
select
    payout_lines.payout_id,
    payout_lines.line_id as balance_transaction_id,
    payout_lines.category,
    payout_lines.net_minor,
    payout_lines.currency,
    provider_objects.payment_id,
    payout_lines.provider,
    payout_lines.account
from surety.payout_lines
left join surety.provider_objects
    on
        payout_lines.provider = provider_objects.provider and payout_lines.account = provider_objects.account
        and payout_lines.line_id = provider_objects.object_id;

comment on view report.payout_lines is
'The balance transactions that each payout pays out, with their payments. The payout''s own line has the category
payout. A charge, refund or dispute without a payment is another system''s.';

create or replace view report.bank_statements as
select
    bank_statements.id,
    bank_statements.account_id,
    bank_accounts.hint as account_hint,
    bank_accounts.currency,
    bank_statements.reference,
    bank_statements.page,
    bank_statements.sequence,
    bank_statements.from_on,
    bank_statements.to_on,
    bank_statements.opening_minor,
    bank_statements.closing_minor,
    bank_statements.line_count,
    bank_statements.lines_minor,
    (
        select count(*) from surety.bank_lines
        where bank_lines.statement_id = bank_statements.id and bank_lines.state = 'unmatched'
    ) as unmatched_count,
    bank_statements.file_id,
    bank_files.name as file_name,
    bank_statements.imported_at
from surety.bank_statements
inner join surety.bank_accounts on bank_statements.account_id = bank_accounts.id
inner join surety.bank_files on bank_statements.file_id = bank_files.id;

comment on view report.bank_statements is 'Imported statements of our bank accounts.';

create or replace view report.bank_lines as
select
    bank_lines.id,
    bank_lines.account_id,
    bank_lines.statement_id,
    bank_lines.place,
    bank_lines.part,
    bank_lines.booked_on,
    bank_lines.value_on,
    bank_lines.amount_minor,
    bank_lines.currency,
    bank_lines.state,
    bank_lines.bank_reference,
    bank_lines.description,
    bank_lines.code,
    bank_lines.is_reversal,
    array(
        select bank_line_payouts.payout_id from surety.bank_line_payouts
        where bank_line_payouts.line_id = bank_lines.id
        order by bank_line_payouts.payout_id
    ) as payout_ids
from surety.bank_lines;

comment on view report.bank_lines is
'The lines of bank statements, with the payouts that each pays. Lines of the state other are not the provider''s.';

create or replace view report.payment_cash as
select
    facts.payment_id,
    facts.data ->> 'source' as source_id,
    facts.object_id as balance_transaction_id,
    facts.data ->> 'category' as category,
    facts.amount_minor as gross_minor,
    (facts.data ->> 'fee')::bigint as fee_minor,
    (facts.data ->> 'net')::bigint as net_minor,
    facts.currency,
    payout_lines.payout_id,
    payouts.status as payout_status,
    payouts.trace_id,
    payouts.arrival_on,
    bank_line_payouts.line_id as bank_line_id,
    bank_lines.booked_on,
    bank_lines.amount_minor as bank_minor,
    bank_line_payouts.matched_by
from surety.facts
left join surety.payout_lines
    on
        facts.provider = payout_lines.provider and facts.account = payout_lines.account
        and facts.object_id = payout_lines.line_id
left join surety.payouts
    on
        payout_lines.provider = payouts.provider and payout_lines.account = payouts.account
        and payout_lines.payout_id = payouts.id
left join surety.bank_line_payouts
    on
        payouts.provider = bank_line_payouts.provider and payouts.account = bank_line_payouts.account
        and payouts.id = bank_line_payouts.payout_id
left join surety.bank_lines on bank_line_payouts.line_id = bank_lines.id
where facts.kind = 'money' and facts.disregarded is null;

comment on view report.payment_cash is
'The way of a payment''s money: from its charge, refund or dispute (source_id) by the balance transaction and the payout
to the line of the bank''s statement. A balance transaction whose payout came in several lines has several rows; null is
what has not happened or is not known yet.';

create or replace view report.dead_letters as
select
    dead_letters.id,
    dead_letters.handler,
    dead_letters.event_id,
    dead_letters.type,
    dead_letters.payment_id,
    dead_letters.reason,
    dead_letters.died_at,
    dead_letters.closed_at,
    dead_letters.closed_as,
    dead_letters.closed_by,
    dead_letters.closed_because
from outbox.dead_letters;

comment on view report.dead_letters is 'Events whose handler gave up, open while closed_at is null.';

create or replace view report.refunds as
select
    refunds.id,
    refunds.payment_id,
    refunds.merchant_id,
    refunds.state,
    refunds.version,
    refunds.amount_minor,
    refunds.currency,
    refunds.reason,
    refunds.is_ours,
    refunds.provider,
    refunds.provider_account,
    refunds.provider_id,
    refunds.failure ->> 'code' as failure_code,
    refunds.created_at,
    refunds.updated_at
from surety.refunds;

comment on view report.refunds is
'One row per refund, as it is now; is_ours is false for one that was made at the provider.';

create or replace view report.disputes as
select
    disputes.id,
    disputes.payment_id,
    disputes.merchant_id,
    disputes.status,
    disputes.amount_minor,
    disputes.withdrawn_minor,
    disputes.currency,
    disputes.reason,
    disputes.evidence_due_at,
    disputes.submit_asked_at,
    disputes.provider,
    disputes.provider_account,
    disputes.provider_id,
    disputes.created_at,
    disputes.updated_at
from surety.disputes;

comment on view report.disputes is
'One row per dispute or inquiry, as of its last fetch. withdrawn_minor is the part that the network holds or keeps.';

create or replace view audit.trail as
select
    entries.id,
    entries.at,
    entries.kind,
    entries.actor,
    entries.address,
    entries.request_id,
    entries.payment_id,
    entries.merchant_id,
    entries.version,
    entries.from_state,
    entries.to_state,
    entries.outcome,
    entries.reason,
    entries.duration_ms,
    entries.snapshot
from audit.entries;

comment on view audit.trail is
'The audit trail, one row per entry, for auditors. Entries are never changed; id and at increase with time.';
