-- The promises that a database can check about itself. Tests, the demo and crash runs use this one function.

create or replace function surety.check_invariants() returns table (name text, violations bigint, example text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    with last_fetches as (
        select distinct on (facts.provider, facts.account, facts.object_id)
            facts.provider,
            facts.account,
            facts.object_id,
            facts.payment_id,
            facts.revision,
            facts.kind,
            facts.amount_minor,
            facts.currency,
            surety.dispute_status(facts.kind, facts.data) as status,
            surety.dispute_withdrawn(facts.kind, facts.amount_minor) as withdrawn_minor
        from surety.facts
        where facts.kind like 'dispute\_%' and facts.disregarded is null
        order by facts.provider asc, facts.account asc, facts.object_id asc, facts.revision desc
    ),

    derived as materialized (
        select * from surety.derive_payments(array(select payments.id from surety.payments))
    ),

    -- Of events that are to be handled: not seen, taken, or to be tried again. Never a walk through all events.
    to_come as materialized (
        select events.aggregate_id
        from outbox.handlers
        inner join outbox.events
            on
                handlers.generation = events.generation and events.xid >= pg_catalog.pg_snapshot_xmin(handlers.seen)
        inner join outbox.handler_events
            on handlers.handler = handler_events.handler and events.type = handler_events.event_type
        where not pg_catalog.pg_visible_in_snapshot(events.xid, handlers.seen)
        union
        select events.aggregate_id
        from outbox.batches
        cross join lateral unnest(batches.event_ids) as taken (event_id)
        inner join outbox.events on taken.event_id = events.id
        union
        select events.aggregate_id
        from outbox.retries
        inner join outbox.events on retries.event_id = events.id
        where retries.due_at is not null
    ),

    checked (name, subject) as (
        select
            'every payment stands where its last step ended',
            payments.id
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
        where (payments.version, payments.state) is distinct from (last.version, last.to_state)
        union all
        select
            'every step starts where the last ended',
            steps.payment_id
        from surety.steps
        left join surety.steps as before on steps.payment_id = before.payment_id and before.version = steps.version - 1
        where steps.version > 1 and steps.from_state is distinct from before.to_state
        union all
        select
            'every step is legal',
            steps.payment_id
        from surety.steps
        left join surety.transitions
            on steps.from_state = transitions.from_state and steps.to_state = transitions.to_state
        where steps.version > 1 and transitions.from_state is null
        union all
        select
            'every state is what its facts say',
            payments.id
        from surety.payments
        left join derived on payments.id = derived.payment_id
        where
            -- What we sent and what was refused is no fact; and what has ended here ends once, unless it succeeds.
            payments.state is distinct from derived.target_state
            and not (derived.payment_id is null and payments.state in ('initiated', 'submitting', 'failed', 'canceled'))
            and not (payments.state in ('failed', 'canceled') and derived.captured_minor = 0)
        union all
        select
            'every amount is what its facts say',
            payments.id
        from surety.payments
        left join derived on payments.id = derived.payment_id
        where
            (payments.captured_minor, payments.refunded_minor, payments.refund_pending_minor) <> (
                coalesce(derived.captured_minor, 0), coalesce(derived.refunded_minor, 0),
                coalesce(derived.refund_pending_minor, 0)
            )
            or (payments.at_risk_minor, payments.reversed_minor) <> (
                coalesce(derived.at_risk_minor, 0), coalesce(derived.reversed_minor, 0)
            )
        union all
        select
            'every step has one audit entry',
            steps.payment_id
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
        where audited.entries is distinct from 1
        union all
        select
            'every step has one event',
            steps.payment_id
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
        ) as told on steps.payment_id = told.aggregate_id and steps.version = told.version
        where
            told.events is distinct from 1
            -- Events are kept for so long only: steps older than the oldest partition have none any more.
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
            )
        union all
        select
            'debits equal credits, per currency',
            sums.currency
        from (
            select
                legs.currency,
                sum(legs.amount_minor) as total
            from (
                select
                    accounts.currency,
                    transfers.amount_minor
                from ledger.transfers
                inner join ledger.accounts on transfers.credit_account = accounts.id
                union all
                select
                    accounts.currency,
                    -transfers.amount_minor
                from ledger.transfers
                inner join ledger.accounts on transfers.debit_account = accounts.id
            ) as legs
            group by legs.currency
        ) as sums
        where sums.total <> 0
        union all
        select
            'every balance is the sum of its transfers',
            accounts.id
        from ledger.accounts
        inner join ledger.account_kinds on accounts.kind = account_kinds.kind
        left join ledger.balances on accounts.id = balances.account_id
        where
            account_kinds.keeps_balance
            and coalesce(balances.balance_minor, 0) <> coalesce((
                select sum(transfers.amount_minor) from ledger.transfers
                where transfers.credit_account = accounts.id
            ), 0) - coalesce((
                select sum(transfers.amount_minor) from ledger.transfers where transfers.debit_account = accounts.id
            ), 0)
        union all
        select
            'every cause posted what its rule says',
            postings.cause
        from ledger.postings
        left join ledger.transfers on postings.id = transfers.posting_id
        where not exists (
            select from ledger.rules
            where
                rules.cause = postings.rule
                and (
                    transfers.leg is null
                    or rules.leg = transfers.leg
                    and array[split_part(transfers.debit_account, ':', 1), split_part(transfers.credit_account, ':', 1)]
                    in (array[rules.debit, rules.credit], array[rules.credit, rules.debit])
                )
        )
        union all
        select
            'what is captured is owed to the merchant',
            payments.id
        from surety.payments
        where payments.captured_minor > 0 and not exists (
            select from ledger.postings
            where postings.payment_id = payments.id and postings.rule in ('captured', 'captured_ach')
        )
        union all
        select
            'what is settled is available to the merchant',
            steps.payment_id
        from surety.steps
        where steps.to_state = 'settled' and not exists (
            select from ledger.postings where postings.cause = steps.payment_id || ':settled'
        )
        union all
        select
            'every fact is known by its key',
            facts.payment_id
        from surety.facts
        left join surety.fact_keys
            on
                facts.provider = fact_keys.provider and facts.account = fact_keys.account
                and facts.livemode = fact_keys.livemode and facts.object_id = fact_keys.object_id
                and facts.kind = fact_keys.kind and facts.revision = fact_keys.revision
        where fact_keys.fact_id is distinct from facts.id
        union all
        select
            'every reference in use is of a payment that lives',
            payment_references.payment_id
        from surety.payment_references
        left join surety.payments on payment_references.payment_id = payments.id
        where payments.id is null or payments.state in ('failed', 'canceled')
        union all
        select
            'every refund stands where its last step ended',
            refunds.id
        from surety.refunds
        left join lateral (
            select
                refund_steps.version,
                refund_steps.to_state
            from surety.refund_steps
            where refund_steps.refund_id = refunds.id
            order by refund_steps.version desc
            limit 1
        ) as last on true
        where (refunds.version, refunds.state) is distinct from (last.version, last.to_state)
        union all
        select
            'every refund step starts where the last ended',
            refund_steps.refund_id
        from surety.refund_steps
        left join surety.refund_steps as before
            on refund_steps.refund_id = before.refund_id and refund_steps.prior_version = before.version
        where refund_steps.version > 1 and refund_steps.from_state is distinct from before.to_state
        union all
        select
            'every payment has given back what its refunds say',
            payments.id
        from surety.payments
        left join (
            select
                refunds.payment_id,
                sum(refunds.amount_minor) filter (where refunds.state = 'succeeded') as succeeded,
                sum(refunds.amount_minor) filter (where refunds.state in ('pending', 'requires_action')) as pending
            from surety.refunds
            group by refunds.payment_id
        ) as given on payments.id = given.payment_id
        where
            payments.refunded_minor <> least(coalesce(given.succeeded, 0), payments.captured_minor)
            or payments.refund_pending_minor
            <> least(coalesce(given.pending, 0), payments.captured_minor - payments.refunded_minor)
        union all
        select
            'what is reserved for refunds is on its way',
            sums.account_id
        from (
            select
                parts.account_id,
                sum(parts.amount_minor) as amount_minor
            from (
                select
                    'reserved_for_refunds:' || refunds.merchant_id || ':' || refunds.currency as account_id,
                    refunds.amount_minor
                from surety.refunds
                inner join surety.refund_states on refunds.state = refund_states.state
                where refund_states.is_live
                union all
                select
                    'reserved_for_refunds:' || payments.merchant_id || ':'
                    || coalesce(facts.data ->> 'other_currency', facts.currency),
                    coalesce((facts.data ->> 'other_gross')::bigint, facts.amount_minor)
                from surety.facts
                inner join surety.payments on facts.payment_id = payments.id
                where
                    facts.kind = 'money' and facts.disregarded is null
                    and facts.data ->> 'category' in ('refund', 'refund_failure')
                union all
                select
                    balances.account_id,
                    -balances.balance_minor
                from ledger.balances
                where balances.account_id like 'reserved\_for\_refunds:%'
            ) as parts
            group by parts.account_id
        ) as sums
        where sums.amount_minor <> 0
        union all
        select
            'every dispute stands as its last fetch told',
            coalesce(disputes.id, last_fetches.object_id)
        from surety.disputes
        full join last_fetches
            on
                disputes.provider = last_fetches.provider and disputes.provider_account = last_fetches.account
                and disputes.provider_id = last_fetches.object_id
        where
            (disputes.payment_id, disputes.revision, disputes.status, disputes.withdrawn_minor) is distinct from (
                last_fetches.payment_id, last_fetches.revision, last_fetches.status, last_fetches.withdrawn_minor
            )
        union all
        select
            'every dispute has posted what its last fetch told',
            disputes.id
        from surety.disputes
        where exists (select from surety.dispute_transfers(disputes.payment_id, disputes.provider_id))
        union all
        select
            'what disputes hold back is held',
            sums.account_id
        from (
            select
                parts.account_id,
                sum(parts.amount_minor) as amount_minor
            from (
                select
                    'disputed:' || payments.merchant_id || ':' || last_fetches.currency as account_id,
                    last_fetches.amount_minor
                from last_fetches
                inner join surety.payments on last_fetches.payment_id = payments.id
                where last_fetches.kind = 'dispute_opened'
                union all
                select
                    balances.account_id,
                    -balances.balance_minor
                from ledger.balances
                where balances.account_id like 'disputed:%'
            ) as parts
            group by parts.account_id
        ) as sums
        where sums.amount_minor <> 0
        union all
        select
            'what came back is taken from the merchant',
            facts.object_id
        from surety.facts
        inner join surety.payments on facts.payment_id = payments.id
        where
            facts.kind in ('returned', 'dishonored', 'contested') and facts.disregarded is null
            and payments.captured_minor > 0
            and not exists (
                select from ledger.postings where postings.cause = facts.object_id || ':' || facts.kind
            )
        union all
        select
            'no payment has two live objects at the provider',
            provider_objects.payment_id
        from surety.provider_objects
        where provider_objects.object_id like 'ch\_%'
        group by provider_objects.payment_id
        having count(*) filter (
            where exists (
                select from surety.facts
                where facts.payment_id = provider_objects.payment_id and facts.object_id = provider_objects.object_id
                    and facts.kind = 'captured'
            )
        ) > 1
        union all
        select
            'no batch outlives its lease unnoticed',
            batches.id::text
        from outbox.batches
        where batches.leased_until < surety.time_now() - interval '10 minutes'
        union all
        select
            'every event is in at most one place per handler',
            held.event_id
        from (
            select
                batches.handler,
                taken.event_id
            from outbox.batches
            cross join lateral unnest(batches.event_ids) as taken (event_id)
            union all
            select
                retries.handler,
                retries.event_id
            from outbox.retries
            where retries.due_at is not null
        ) as held
        group by held.handler, held.event_id
        having count(*) > 1
        union all
        select
            'no payment is forgotten',
            payments.id
        from surety.payments
        inner join surety.states on payments.state = states.state
        where
            -- Nobody asks, nothing is expected, no dispute is open; and no event of its is to be handled, nor dead.
            not states.is_final and payments.poll_at is null
            and not exists (
                select from surety.expectations
                where expectations.payment_id = payments.id and expectations.met_at is null
            )
            and not exists (
                select from surety.disputes
                where disputes.payment_id = payments.id and disputes.poll_at is not null
            )
            and not exists (select from to_come where to_come.aggregate_id = payments.id)
            and not exists (
                select from outbox.dead_letters
                where dead_letters.payment_id = payments.id and dead_letters.closed_at is null
            )
        union all
        select
            'what is expected is met by what came',
            expectations.payment_id
        from surety.expectations
        where
            expectations.met_at is not null and not exists (
                select from surety.steps
                where steps.payment_id = expectations.payment_id and steps.to_state = 'settled'
            )
        union all
        select
            'what is overdue is told',
            expectations.payment_id
        from surety.expectations
        where
            expectations.met_at is null and expectations.due_at < surety.time_now() - interval '10 minutes'
            and not exists (
                select from surety.discrepancies
                where discrepancies.kind = 'overdue' and discrepancies.subject = expectations.payment_id
            )
    ),

    names (name, place) as (
        select
            listed.name,
            listed.place
        from unnest(array[
            'every payment stands where its last step ended',
            'every step starts where the last ended',
            'every step is legal',
            'every state is what its facts say',
            'every amount is what its facts say',
            'every step has one audit entry',
            'every step has one event',
            'debits equal credits, per currency',
            'every balance is the sum of its transfers',
            'every cause posted what its rule says',
            'what is captured is owed to the merchant',
            'what is settled is available to the merchant',
            'every fact is known by its key',
            'every reference in use is of a payment that lives',
            'every refund stands where its last step ended',
            'every refund step starts where the last ended',
            'every payment has given back what its refunds say',
            'what is reserved for refunds is on its way',
            'every dispute stands as its last fetch told',
            'every dispute has posted what its last fetch told',
            'what disputes hold back is held',
            'what came back is taken from the merchant',
            'no payment has two live objects at the provider',
            'no batch outlives its lease unnoticed',
            'every event is in at most one place per handler',
            'no payment is forgotten',
            'what is expected is met by what came',
            'what is overdue is told'
        ]) with ordinality as listed (name, place)
    )

    select
        names.name,
        count(checked.subject),
        min(checked.subject)
    from names
    left join checked on names.name = checked.name
    group by names.name, names.place
    order by names.place;
end;

comment on function surety.check_invariants() is
'Each promise with the number of its violations, zero in a sound database, and one example.';
