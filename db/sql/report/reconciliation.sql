-- Reconciliation: every record after which something should follow, in exactly one of four classes.
--
--   record                what should follow                        deadline
--   payment               its settlement                            seven days after its confirmation
--   refund                its end at the provider                   that of its state (surety.refund_states)
--   dispute               the answer, while its status takes one    the network's
--   payout                its line at the bank                      eight days after its arrival there
--   other                 an explanation of a discrepancy that is about none of these

create or replace view report.reconciliation as
with breaks as materialized (
    select
        discrepancies.id,
        discrepancies.payment_id,
        split_part(discrepancies.subject, ':', 1) as object_id,
        discrepancies.merchant_id,
        discrepancies.opened_at
    from surety.discrepancies
    -- An overdue record is overdue, not discrepant.
    where discrepancies.closed_at is null and discrepancies.kind <> 'overdue'
),

expected as (
    select
        'payment' as record,
        expectations.payment_id as id,
        null as object_id,
        expectations.payment_id,
        expectations.opened_at,
        expectations.due_at,
        expectations.met_at is not null as is_met
    from surety.expectations
    where expectations.kind = 'settlement'
    union all
    select
        'refund',
        refunds.id,
        refunds.provider_id,
        refunds.payment_id,
        refunds.created_at,
        refunds.updated_at + coalesce(refund_states.overdue_after, interval '30 days'),
        refunds.state not in ('pending', 'requires_action')
    from surety.refunds
    inner join surety.refund_states on refunds.state = refund_states.state
    union all
    select
        'dispute',
        disputes.id,
        disputes.provider_id,
        disputes.payment_id,
        disputes.created_at,
        disputes.evidence_due_at,
        coalesce(not dispute_statuses.takes_evidence, false)
    from surety.disputes
    left join surety.dispute_statuses on disputes.status = dispute_statuses.status
    union all
    select
        'payout',
        payouts.id,
        payouts.id,
        null,
        payouts.created_at,
        coalesce(payouts.arrival_on::timestamptz, payouts.created_at) + interval '8 days',
        payouts.expected_minor = payouts.matched_minor
    from surety.payouts
    -- Without a bank account here, no line of a bank is awaited.
    where
        exists (
            select from surety.bank_accounts
            where
                bank_accounts.provider_account = payouts.account and bank_accounts.currency = payouts.currency
        )
    union all
    select
        'other',
        breaks.id,
        breaks.id,
        null,
        breaks.opened_at,
        null,
        false
    from breaks
    where
        (
            breaks.payment_id is null
            or not exists (
                select from surety.expectations
                where expectations.payment_id = breaks.payment_id and expectations.kind = 'settlement'
            )
        )
        and not exists (
            select from surety.refunds
            where breaks.object_id in (refunds.id, refunds.provider_id) and refunds.payment_id = breaks.payment_id
        )
        and not exists (
            select from surety.disputes
            where breaks.object_id in (disputes.id, disputes.provider_id) and disputes.payment_id = breaks.payment_id
        )
        and not exists (
            select from surety.payouts
            inner join surety.bank_accounts
                on
                    payouts.account = bank_accounts.provider_account and payouts.currency = bank_accounts.currency
            where payouts.id = breaks.object_id
        )
)

select
    expected.record,
    expected.id,
    expected.payment_id,
    case
        when expected.record = 'other' then 'discrepant'
        when expected.record = 'payment' and expected.id in (
            select breaks.payment_id from breaks
            where breaks.payment_id is not null
        ) then 'discrepant'
        when
            expected.id in (select breaks.object_id from breaks)
            or expected.object_id in (select breaks.object_id from breaks) then 'discrepant'
        when expected.is_met then 'explained'
        -- As surety.time_now(), which analysts may not call.
        when
            expected.due_at < statement_timestamp() + coalesce((select clock.ahead from surety.clock), interval '0')
            then 'overdue'
        else 'pending'
    end as class,
    expected.opened_at,
    expected.due_at
from expected;

comment on view report.reconciliation is
'Every record after which something should follow, each in one class: discrepant (an open discrepancy is about it),
explained (it followed), overdue (the deadline has passed), pending (the deadline is ahead, or none is known).';
