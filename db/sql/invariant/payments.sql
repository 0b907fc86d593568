-- Invariants of payments: their steps, facts, references and expected settlements.

create or replace view invariant.payments_match_last_step as
select payments.id as subject
from surety.payments
left join lateral (
    select
        steps.version,
        steps.to_state
    from surety.steps
    where steps.payment_id = payments.id
    order by steps.version desc
    limit 1
) as last on true
where (payments.version, payments.state) is distinct from (last.version, last.to_state);

comment on view invariant.payments_match_last_step is 'every payment is in the state of its last step';

create or replace view invariant.steps_are_connected as
select steps.payment_id as subject
from surety.steps
left join surety.steps as before on steps.payment_id = before.payment_id and before.version = steps.version - 1
where steps.version > 1 and steps.from_state is distinct from before.to_state;

comment on view invariant.steps_are_connected is 'every step starts where the last ended';

create or replace view invariant.steps_are_legal as
select steps.payment_id as subject
from surety.steps
left join surety.transitions
    on steps.from_state = transitions.from_state and steps.to_state = transitions.to_state
where steps.version > 1 and transitions.from_state is null;

comment on view invariant.steps_are_legal is 'every step is legal';

create or replace view invariant.payments_match_facts as
-- State and amounts are one invariant, because both need the expensive derivation from the facts.
select payments.id as subject
from surety.payments
left join
    surety.derive_payments(array(select all_payments.id from surety.payments as all_payments)) as derived
    on payments.id = derived.payment_id
where
    -- Initiated, submitting and refused payments have no facts. A payment that ended stays ended unless it is captured.
    (
        payments.state is distinct from derived.target_state
        and not (derived.payment_id is null and payments.state in ('initiated', 'submitting', 'failed', 'canceled'))
        and not (payments.state in ('failed', 'canceled') and derived.captured_minor = 0)
    )
    or (payments.captured_minor, payments.refunded_minor, payments.refund_pending_minor) <> (
        coalesce(derived.captured_minor, 0), coalesce(derived.refunded_minor, 0),
        coalesce(derived.refund_pending_minor, 0)
    )
    or (payments.at_risk_minor, payments.reversed_minor) <> (
        coalesce(derived.at_risk_minor, 0), coalesce(derived.reversed_minor, 0)
    );

comment on view invariant.payments_match_facts is 'every state and amount is what its facts say';

create or replace view invariant.steps_are_audited as
select steps.payment_id as subject
from surety.steps
left join (
    select
        entries.payment_id,
        entries.version,
        count(*) as entries
    from audit.entries
    where entries.kind = 'step'
    group by entries.payment_id, entries.version
) as audited on steps.payment_id = audited.payment_id and steps.version = audited.version
where audited.entries is distinct from 1;

comment on view invariant.steps_are_audited is 'every step has one audit entry';

create or replace view invariant.steps_have_events as
select steps.payment_id as subject
from surety.steps
left join (
    select
        events.aggregate_id,
        events.version,
        count(*) as events
    from outbox.events
    inner join surety.states on events.type = 'payment.' || states.state
    where events.aggregate_type = 'payment'
    group by events.aggregate_id, events.version
) as emitted on steps.payment_id = emitted.aggregate_id and steps.version = emitted.version
where
    emitted.events is distinct from 1
    -- Old partitions of events are dropped, and with them the events of old steps.
    and surety.id_at('evt', steps.at) >= (
        select coalesce(min(kept.since), '')
        from pg_catalog.pg_inherits
        inner join pg_catalog.pg_class on pg_inherits.inhrelid = pg_class.oid
        cross join lateral (
            select coalesce(
                substring(
                    pg_catalog.pg_get_expr(pg_class.relpartbound, pg_class.oid)
                    from 'FROM \(''(evt_[0-9a-f]+)'
                ),
                ''
            ) as since
        ) as kept
        where pg_inherits.inhparent = 'outbox.events'::regclass
    );

comment on view invariant.steps_have_events is 'every step has one event';

create or replace view invariant.facts_are_known_by_key as
select facts.payment_id as subject
from surety.facts
left join surety.fact_keys
    on
        facts.provider = fact_keys.provider and facts.account = fact_keys.account
        and facts.livemode = fact_keys.livemode and facts.object_id = fact_keys.object_id
        and facts.kind = fact_keys.kind and facts.revision = fact_keys.revision
where fact_keys.fact_id is distinct from facts.id;

comment on view invariant.facts_are_known_by_key is 'every fact is known by its key';

create or replace view invariant.references_are_of_live_payments as
select payment_references.payment_id as subject
from surety.payment_references
left join surety.payments on payment_references.payment_id = payments.id
where payments.id is null or payments.state in ('failed', 'canceled');

comment on view invariant.references_are_of_live_payments is 'every reference in use belongs to a live payment';

create or replace view invariant.payments_have_one_charge as
select provider_objects.payment_id as subject
from surety.provider_objects
where provider_objects.object_id like 'ch\_%'
group by provider_objects.payment_id
having count(*) filter (
    where exists (
        select from surety.facts
        where facts.payment_id = provider_objects.payment_id and facts.object_id = provider_objects.object_id
            and facts.kind = 'captured'
    )
) > 1;

comment on view invariant.payments_have_one_charge is 'no payment has two charges at the provider';

create or replace view invariant.met_expectations_are_settled as
select expectations.payment_id as subject
from surety.expectations
where
    expectations.met_at is not null and not exists (
        select from surety.steps
        where steps.payment_id = expectations.payment_id and steps.to_state = 'settled'
    )
    -- The money of a payment with a loss arrives without that step.
    and not exists (
        select from ledger.postings
        where postings.cause = expectations.payment_id || ':settled'
    );

comment on view invariant.met_expectations_are_settled is 'every met expectation belongs to a settled payment';

create or replace view invariant.overdue_expectations_are_discrepancies as
select expectations.payment_id as subject
from surety.expectations
where
    expectations.met_at is null and expectations.due_at < surety.read_clock() - interval '10 minutes'
    and not exists (
        select from surety.discrepancies
        where discrepancies.kind = 'overdue' and discrepancies.subject = expectations.payment_id
    );

comment on view invariant.overdue_expectations_are_discrepancies is 'every overdue settlement is a discrepancy';

create or replace view invariant.causes_open_one_discrepancy as
select later.id as subject
from surety.discrepancies as later
inner join surety.discrepancies as earlier
    on later.kind = earlier.kind and later.subject = earlier.subject and later.occurrence > earlier.occurrence
where
    earlier.closed_as is distinct from 'arrived_late'
    -- As it was opened: a repetition may have brought back values that were explained before.
    and coalesce(later.first -> 'fields', later.fields) in (earlier.fields, earlier.first -> 'fields');

comment on view invariant.causes_open_one_discrepancy is 'no cause opens a second discrepancy';

create or replace view invariant.labels_match_payments as
with wanted as materialized (
    select
        payments.merchant_id,
        labels.name,
        labels.value,
        payments.id as payment_id
    from surety.payments
    cross join lateral surety.labels_of_payment(payments) as labels
),

differing as (
    (
        select wanted.*
        from wanted
        except
        select payment_labels.*
        from surety.payment_labels
    )
    union all
    (
        select payment_labels.*
        from surety.payment_labels
        except
        select wanted.*
        from wanted
    )
)

select distinct differing.payment_id as subject
from differing;

comment on view invariant.labels_match_payments is 'a payment is found by its metadata and e-mail address';

create or replace view invariant.fraud_warnings_match_facts as
select payments.id as subject
from surety.payments
left join lateral (
    select facts.kind = 'fraud_warning' as is_actionable
    from surety.facts
    where
        facts.payment_id = payments.id and facts.kind in ('fraud_warning', 'fraud_warning_closed')
        and facts.disregarded is null
    order by facts.occurred_at desc, facts.object_id desc, facts.kind desc
    limit 1
) as newest on true
where newest.is_actionable is distinct from (payments.fraud_warning ->> 'actionable')::boolean;

comment on view invariant.fraud_warnings_match_facts is 'every payment shows its newest warning of fraud';
